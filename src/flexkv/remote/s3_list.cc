#include "flexkv/remote/s3_list.h"

#include <charconv>
#include <optional>

namespace flexkv::remote {
namespace {

constexpr std::size_t kCodeMax = 64;

// What stands between the first <tag> and its end; names of objects that are ours have nothing to unescape.
std::optional<std::string_view> element(std::string_view xml, const std::string& tag) {
  const std::string open = '<' + tag + '>';
  const std::size_t at = xml.find(open);
  if (at == xml.npos) return {};
  const std::size_t begin = at + open.size();
  const std::size_t end = xml.find("</" + tag + '>', begin);
  if (end == xml.npos) return {};
  return xml.substr(begin, end - begin);
}

}  // namespace

Result<S3Page> parse_s3_page(std::string_view xml) {
  const auto wrong = [](const char* why) {
    return Error{ErrorCode::kCorruption, std::string("the answer is no listing: ") + why};
  };
  if (xml.find("<ListBucketResult") == xml.npos || xml.find("</ListBucketResult>") == xml.npos) {
    return wrong("no whole ListBucketResult");
  }
  S3Page page;
  const auto truncated = element(xml, "IsTruncated");
  if (!truncated) return wrong("no IsTruncated");
  page.truncated = *truncated == "true";
  constexpr std::string_view kEnd = "</Contents>";
  for (std::size_t at = xml.find("<Contents>"); at != xml.npos; at = xml.find("<Contents>", at)) {
    const auto contents = element(xml.substr(at), "Contents");
    if (!contents) return wrong("Contents without an end");
    const auto key = element(*contents, "Key");
    const auto size = element(*contents, "Size");
    if (!key || !size) return wrong("Contents without Key or Size");
    std::uint64_t bytes = 0;
    const auto [end, error] = std::from_chars(size->data(), size->data() + size->size(), bytes);
    if (error != std::errc{} || end != size->data() + size->size()) return wrong("a Size is no number");
    page.objects.push_back({std::string(*key), bytes});
    at += contents->size() + kEnd.size();
  }
  if (page.truncated && page.objects.empty()) return wrong("an empty page that is not the last one");
  return page;
}

std::string s3_error_code(std::string_view xml) {
  const auto code = element(xml, "Code");
  constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.";
  if (!code || code->size() > kCodeMax || code->find_first_not_of(kLetters) != code->npos) return {};
  return std::string(*code);
}

}  // namespace flexkv::remote
