from flexkv.cli.app import main

main()
