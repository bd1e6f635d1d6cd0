#include "flexkv/net/nixl_library.h"

#include <dlfcn.h>

namespace flexkv::net {

Result<NixlLibrary> NixlLibrary::load(const std::string& path) {
  const auto unusable = [&](const std::string& why) {
    return Error{ErrorCode::kUnsupported,
                 "NIXL cannot be used: " + why + " (tested with: pip install nixl-cu13==1.5.1)"};
  };
  void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return unusable(::dlerror());
  std::string missing;
  const auto find = [&]<typename Function>(Function& function, const std::string& name) {
    function = reinterpret_cast<Function>(::dlsym(library, ("nixl_capi_" + name).c_str()));
    if (function == nullptr) missing = name;
  };
  NixlLibrary nixl{};
  find(nixl.is_stub, "is_stub");
  find(nixl.create_configured_agent, "create_configured_agent");
  find(nixl.destroy_agent, "destroy_agent");
  find(nixl.get_plugin_params, "get_plugin_params");
  find(nixl.destroy_mem_list, "destroy_mem_list");
  find(nixl.destroy_params, "destroy_params");
  find(nixl.create_backend, "create_backend");
  find(nixl.destroy_backend, "destroy_backend");
  find(nixl.create_reg_dlist, "create_reg_dlist");
  find(nixl.destroy_reg_dlist, "destroy_reg_dlist");
  find(nixl.reg_dlist_add_desc, "reg_dlist_add_desc");
  find(nixl.register_mem, "register_mem");
  find(nixl.get_local_md, "get_local_md");
  find(nixl.load_remote_md, "load_remote_md");
  find(nixl.invalidate_remote_md, "invalidate_remote_md");
  find(nixl.create_xfer_dlist, "create_xfer_dlist");
  find(nixl.destroy_xfer_dlist, "destroy_xfer_dlist");
  find(nixl.xfer_dlist_add_desc, "xfer_dlist_add_desc");
  find(nixl.create_xfer_req, "create_xfer_req");
  find(nixl.post_xfer_req, "post_xfer_req");
  find(nixl.get_xfer_status, "get_xfer_status");
  find(nixl.release_xfer_req, "release_xfer_req");
  find(nixl.destroy_xfer_req, "destroy_xfer_req");
  if (!missing.empty()) return unusable(path + " has no nixl_capi_" + missing);
  if (nixl.is_stub()) return unusable(path + " is a stub, and NIXL itself is not there");
  return nixl;
}

}  // namespace flexkv::net
