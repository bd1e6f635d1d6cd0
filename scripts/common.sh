# shellcheck shell=bash disable=SC2034
# Sourced by the commands beside it. Sets `root`, `cache`, `venv`, `python`, JOBS; gives `say`, `fail`, `step` and
# `help_if_asked`.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/.cache
venv=$root/.venv
python=$venv/bin/python
# Compilers here take up to 1 GiB each.
JOBS=${JOBS:-$(nproc)}
# So that a clone in another folder finds what this one has compiled.
export CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1

say() { printf '%s\n' "$*"; }

fail() {
  printf 'ERROR: %s\n' "$*" >&2
  exit 1
}

# help_if_asked ARGUMENT...: for --help or -h, prints the comment that begins the command, and ends.
help_if_asked() {
  case " $* " in
    *" --help "* | *" -h "*)
      sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
  esac
}

# step LOG TITLE COMMAND...: runs the command with its output appended to LOG; shows its title and the elapsed time, and
# the end of what it wrote when it fails. Returns the command's status.
step() {
  local log=$1 title=$2 start=$SECONDS ticker='' first status
  shift 2
  mkdir -p "$(dirname "$log")"
  printf '\n=== %s: %s\n' "$(date '+%F %T')" "$title" >>"$log"
  first=$(wc -l <"$log")
  if [ -t 1 ]; then
    (while :; do
      printf '\r  %-60s %4d s ' "$title" $((SECONDS - start))
      sleep 1
    done) &
    ticker=$!
  else
    printf '  %-60s' "$title"
  fi
  "$@" >>"$log" 2>&1 </dev/null && status=0 || status=$?
  if [ -n "$ticker" ]; then
    kill "$ticker"
    wait "$ticker" 2>/dev/null || true
    printf '\r  %-60s' "$title"
  fi
  if [ "$status" = 0 ]; then
    printf ' %4d s\n' $((SECONDS - start))
  else
    printf ' FAILED after %d s\n' $((SECONDS - start))
    tail -n +"$((first + 1))" "$log" | tail -n 30 | sed 's/^/    /'
    say "  Whole log: $log"
  fi
  return "$status"
}
