#include "flexkv/remote/curl_library.h"

#include <dlfcn.h>

namespace flexkv::remote {
namespace {

constexpr const char* kName = "libcurl.so.4";
constexpr unsigned kVersionMin = 0x075800;  // 7.88.0: signs all x-amz- headers, and payloads of uploads as said there

Result<CurlLibrary> load() {
  const auto unusable = [](const std::string& why) {
    return Error{ErrorCode::kUnsupported, std::string("s3:// needs libcurl 7.88 or later: ") + why +
                                              " (Debian and Ubuntu: apt-get install libcurl4)"};
  };
  void* const library = ::dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return unusable(::dlerror());
  const char* missing = nullptr;
  const auto find = [&]<typename Function>(Function& function, const char* name) {
    function = reinterpret_cast<Function>(::dlsym(library, name));
    if (function == nullptr) missing = name;
  };
  CurlLibrary curl{};
  find(curl.global_init, "curl_global_init");
  find(curl.version_info, "curl_version_info");
  find(curl.easy_init, "curl_easy_init");
  find(curl.easy_cleanup, "curl_easy_cleanup");
  find(curl.easy_setopt, "curl_easy_setopt");
  find(curl.easy_getinfo, "curl_easy_getinfo");
  find(curl.easy_strerror, "curl_easy_strerror");
  find(curl.slist_append, "curl_slist_append");
  find(curl.slist_free_all, "curl_slist_free_all");
  find(curl.multi_init, "curl_multi_init");
  find(curl.multi_cleanup, "curl_multi_cleanup");
  find(curl.multi_setopt, "curl_multi_setopt");
  find(curl.multi_add_handle, "curl_multi_add_handle");
  find(curl.multi_remove_handle, "curl_multi_remove_handle");
  find(curl.multi_perform, "curl_multi_perform");
  find(curl.multi_info_read, "curl_multi_info_read");
  find(curl.multi_poll, "curl_multi_poll");
  find(curl.multi_wakeup, "curl_multi_wakeup");
  if (missing != nullptr) return unusable(std::string(kName) + " has no " + missing);
  const curl_version_info_data* const version = curl.version_info(CURLVERSION_NOW);
  if (version->version_num < kVersionMin) return unusable(std::string(kName) + " is " + version->version);
  if ((version->features & CURL_VERSION_ASYNCHDNS) == 0)
    return unusable(std::string(kName) + " resolves names while all wait");
  if (curl.global_init(CURL_GLOBAL_ALL) != CURLE_OK) return unusable("it cannot be initialised");
  return curl;
}

}  // namespace

Result<const CurlLibrary*> CurlLibrary::get() {
  static const Result<CurlLibrary> loaded = load();
  if (!loaded.ok()) return loaded.error();
  return &loaded.value();
}

}  // namespace flexkv::remote
