#include "flexkv/remote/s3_store.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/remote/s3_list.h"

namespace flexkv::remote {
namespace {

constexpr unsigned kWidth = 32;  // connections
constexpr long kConnectMilliseconds = 5000;
constexpr long kBufferBytes = 512 << 10;
constexpr std::size_t kBodyBytesMax = 4 << 20;  // of an answer that is not an object's bytes
constexpr const char* kPageObjects = "1000";

// Where the next bytes of some parts are.
template <typename Part>
class Cursor {
 public:
  explicit Cursor(std::vector<std::span<Part>> parts) : parts_(std::move(parts)), left_(bytes_of(parts_)) {}

  std::uint64_t left() const { return left_; }
  void rewind() { *this = Cursor(std::move(parts_)); }
  // Up to `size` bytes that follow one another; REQUIRES: left() > 0 and size > 0
  std::span<Part> take(std::size_t size) {
    while (at_ == parts_[part_].size()) {
      ++part_;
      at_ = 0;
    }
    const auto taken = parts_[part_].subspan(at_, std::min(size, parts_[part_].size() - at_));
    at_ += taken.size();
    left_ -= taken.size();
    return taken;
  }

 private:
  std::vector<std::span<Part>> parts_;
  std::uint64_t left_ = 0;
  std::size_t part_ = 0;
  std::size_t at_ = 0;
};

std::string escape_slashes(const std::string& text) {
  std::string out;
  for (const char c : text) out += c == '/' ? std::string("%2F") : std::string(1, c);
  return out;
}

}  // namespace

struct S3Store::Transfer {
  enum class Kind : std::uint8_t { kPut, kGet, kList };

  explicit Transfer(const CurlLibrary& library) : curl(library), easy(library.easy_init()) {
    FLEXKV_ASSERT(easy != nullptr);
  }
  ~Transfer() {
    curl.easy_cleanup(easy);
    curl.slist_free_all(headers);
  }
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;

  void set(CURLoption option, long value) { FLEXKV_ASSERT(curl.easy_setopt(easy, option, value) == CURLE_OK); }
  void set_bytes(CURLoption option, std::uint64_t value) {
    FLEXKV_ASSERT(curl.easy_setopt(easy, option, static_cast<curl_off_t>(value)) == CURLE_OK);
  }
  template <typename Value>
  void set(CURLoption option, Value* value) {
    FLEXKV_ASSERT(curl.easy_setopt(easy, option, value) == CURLE_OK);
  }
  void set(CURLoption option, const std::string& value) { set(option, value.c_str()); }
  void add_header(const std::string& header) { headers = curl.slist_append(headers, header.c_str()); }

  static std::size_t on_received(char* bytes, std::size_t size, std::size_t count, Transfer* self);
  static std::size_t on_sending(char* bytes, std::size_t size, std::size_t count, Transfer* self);
  static int on_rewind(Transfer* self, curl_off_t offset, int origin);
  long status() const {
    long code = 0;
    curl.easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &code);
    return code;
  }

  const CurlLibrary& curl;
  CURL* const easy;
  curl_slist* headers = nullptr;
  std::array<char, CURL_ERROR_SIZE> error{};
  Kind kind = Kind::kPut;
  Cursor<const std::byte> sent{{}};
  Cursor<std::byte> received{{}};
  std::string body;
};

// curl takes any other count than that of the bytes as an order to give the transfer up.
std::size_t S3Store::Transfer::on_received(char* bytes, std::size_t size, std::size_t count, Transfer* self) {
  std::span<const char> rest(bytes, size * count);
  if (self->kind != Kind::kGet || self->status() != 206) {
    if (self->body.size() + rest.size() > kBodyBytesMax) return 0;
    self->body.append(rest.data(), rest.size());
    return size * count;
  }
  while (!rest.empty()) {
    if (self->received.left() == 0) return 0;  // more than was asked for
    const auto room = self->received.take(rest.size());
    std::memcpy(room.data(), rest.data(), room.size());
    rest = rest.subspan(room.size());
  }
  return size * count;
}

std::size_t S3Store::Transfer::on_sending(char* bytes, std::size_t size, std::size_t count, Transfer* self) {
  std::size_t done = 0;
  while (done < size * count && self->sent.left() > 0) {
    const auto part = self->sent.take(size * count - done);
    std::memcpy(bytes + done, part.data(), part.size());
    done += part.size();
  }
  return done;
}

// When a connection that was kept turns out to be closed, curl sends all again on another one.
int S3Store::Transfer::on_rewind(Transfer* self, curl_off_t offset, int origin) {
  if (offset != 0 || origin != SEEK_SET) return CURL_SEEKFUNC_CANTSEEK;
  self->sent.rewind();
  return CURL_SEEKFUNC_OK;
}

Result<std::unique_ptr<Store>> S3Store::open(const Location& location, const S3Options& options) {
  const auto wrong = [&](const std::string& why) {
    return Error{ErrorCode::kInvalidArgument, "s3://" + location.bucket + ": " + why};
  };
  std::string endpoint = options.endpoint;
  if (endpoint.empty()) endpoint = "https://s3." + options.region + ".amazonaws.com";
  while (endpoint.ends_with('/')) endpoint.pop_back();
  const std::size_t host = endpoint.find("://");
  const std::string scheme = endpoint.substr(0, host == endpoint.npos ? 0 : host);
  if ((scheme != "http" && scheme != "https") || endpoint.find_first_of("@?#/", host + 3) != endpoint.npos) {
    return wrong("the endpoint is not of the form http(s)://HOST[:PORT]");
  }
  if (options.region.empty() || options.region.find(':') != options.region.npos) return wrong("no such region");
  if (options.access_key.empty() != options.secret_key.empty()) {
    return wrong("of access key and secret key there is only one; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
  }
  const auto curl = CurlLibrary::get();
  if (!curl.ok()) return curl.error();
  const std::string base = options.path_style
                               ? endpoint + '/' + location.bucket + '/'
                               : scheme + "://" + location.bucket + '.' + endpoint.substr(host + 3) + '/';
  return std::unique_ptr<Store>(
      new S3Store(*curl.value(), options, base, location.path.empty() ? "" : location.path + '/'));
}

S3Store::S3Store(const CurlLibrary& curl, S3Options options, std::string base_url, std::string prefix)
    : curl_(curl),
      options_(std::move(options)),
      base_url_(std::move(base_url)),
      prefix_(std::move(prefix)),
      multi_(curl.multi_init()) {
  FLEXKV_ASSERT(multi_ != nullptr);
  curl_.multi_setopt(multi_, CURLMOPT_MAXCONNECTS, static_cast<long>(kWidth));
  curl_.multi_setopt(multi_, CURLMOPT_MAX_TOTAL_CONNECTIONS, static_cast<long>(kWidth));
}

S3Store::~S3Store() {
  while (!transfers_.empty()) abandon(transfers_.begin()->first);
  curl_.multi_cleanup(multi_);
}

unsigned S3Store::width() const { return kWidth; }

S3Store::Transfer& S3Store::add(OpId id, const std::string& url) {
  auto& transfer = *(transfers_[id] = std::make_unique<Transfer>(curl_));
  transfer.set(CURLOPT_URL, url);
  transfer.set(CURLOPT_PRIVATE, reinterpret_cast<void*>(id));
  transfer.set(CURLOPT_PROTOCOLS_STR, "http,https");
  transfer.set(CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
  transfer.set(CURLOPT_NOSIGNAL, 1L);
  transfer.set(CURLOPT_QUICK_EXIT, 1L);  // abandoning one whose name is being looked up must not wait
  transfer.set(CURLOPT_CONNECTTIMEOUT_MS, kConnectMilliseconds);
  transfer.set(CURLOPT_BUFFERSIZE, kBufferBytes);
  transfer.set(CURLOPT_UPLOAD_BUFFERSIZE, kBufferBytes);
  transfer.set(CURLOPT_ERRORBUFFER, transfer.error.data());
  transfer.set(CURLOPT_WRITEFUNCTION, &Transfer::on_received);
  transfer.set(CURLOPT_WRITEDATA, &transfer);
  if (!options_.ca_file.empty()) transfer.set(CURLOPT_CAINFO, options_.ca_file);
  if (!options_.access_key.empty()) {
    transfer.set(CURLOPT_AWS_SIGV4, "aws:amz:" + options_.region + ":s3");
    transfer.set(CURLOPT_USERNAME, options_.access_key);
    transfer.set(CURLOPT_PASSWORD, options_.secret_key);
    if (!options_.session_token.empty()) transfer.add_header("x-amz-security-token: " + options_.session_token);
    // Blocks carry checksums of their own; hashing them once more would cost a core per 2 GB/s.
    transfer.add_header("x-amz-content-sha256: UNSIGNED-PAYLOAD");
  }
  return transfer;
}

void S3Store::start(OpId id, Transfer& transfer) {
  transfer.set(CURLOPT_HTTPHEADER, transfer.headers);
  FLEXKV_ASSERT(curl_.multi_add_handle(multi_, transfer.easy) == CURLM_OK && transfers_.contains(id));
}

void S3Store::begin(OpId id, PutOp op) {
  Transfer& transfer = add(id, url_of(op.path));
  transfer.kind = Transfer::Kind::kPut;
  transfer.sent = Cursor(std::move(op.parts));
  transfer.set(CURLOPT_UPLOAD, 1L);
  transfer.set_bytes(CURLOPT_INFILESIZE_LARGE, transfer.sent.left());
  transfer.set(CURLOPT_READFUNCTION, &Transfer::on_sending);
  transfer.set(CURLOPT_READDATA, &transfer);
  transfer.set(CURLOPT_SEEKFUNCTION, &Transfer::on_rewind);
  transfer.set(CURLOPT_SEEKDATA, &transfer);
  transfer.set(CURLOPT_EXPECT_100_TIMEOUT_MS, 0L);  // do not wait for it; a header that forbids it would be signed
  start(id, transfer);
}

void S3Store::begin(OpId id, GetOp op) {
  Transfer& transfer = add(id, url_of(op.path));
  transfer.kind = Transfer::Kind::kGet;
  transfer.received = Cursor(std::move(op.parts));
  const std::uint64_t last = op.offset + transfer.received.left() - 1;
  transfer.set(CURLOPT_RANGE, std::to_string(op.offset) + '-' + std::to_string(last));
  start(id, transfer);
}

// Parameters in the order of their names, as they are signed.
void S3Store::begin(OpId id, ListOp op) {
  std::string url = base_url_;
  url.pop_back();
  if (!options_.path_style) url += '/';
  url += std::string("?list-type=2&max-keys=") + kPageObjects + "&prefix=" + escape_slashes(prefix_ + op.folder);
  if (!op.from.empty()) url += "&start-after=" + escape_slashes(prefix_ + op.from);
  Transfer& transfer = add(id, url);
  transfer.kind = Transfer::Kind::kList;
  start(id, transfer);
}

void S3Store::abandon(OpId id) {
  const auto found = transfers_.find(id);
  if (found == transfers_.end()) return;
  curl_.multi_remove_handle(multi_, found->second->easy);
  transfers_.erase(found);
}

void S3Store::wait(std::optional<Nanos> until, std::vector<Ended>& ended) {
  constexpr Nanos kLongest = 3600 * kSecond;
  while (true) {
    move(ended);
    const Nanos left = until ? std::clamp<Nanos>(*until - monotonic_now(), 0, kLongest) : kLongest;
    if (!ended.empty() || left == 0 || woken_.exchange(false)) return;
    const auto milliseconds = static_cast<int>((left + kMillisecond - 1) / kMillisecond);
    curl_.multi_poll(multi_, nullptr, 0, milliseconds, nullptr);
  }
}

void S3Store::wake() {
  woken_ = true;
  curl_.multi_wakeup(multi_);
}

void S3Store::move(std::vector<Ended>& ended) {
  int running = 0;
  FLEXKV_ASSERT(curl_.multi_perform(multi_, &running) == CURLM_OK);
  int queued = 0;
  while (const CURLMsg* const message = curl_.multi_info_read(multi_, &queued)) {
    if (message->msg != CURLMSG_DONE) continue;
    void* id = nullptr;
    curl_.easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &id);
    const auto op = reinterpret_cast<OpId>(id);
    ended.push_back(end_of(op, *transfers_.at(op), message->data.result));
    abandon(op);
  }
}

Ended S3Store::end_of(OpId id, Transfer& transfer, CURLcode code) const {
  const long status = transfer.status();
  const std::string error_code = s3_error_code(transfer.body);
  const auto ended = [&](StoreOutcome outcome) {
    std::string why = base_url_ + ": HTTP " + std::to_string(status) + (error_code.empty() ? "" : " " + error_code);
    if (error_code == "NoSuchBucket") why += ": there is no such bucket, and FlexKV makes none";
    if (status == 401 || status == 403) {
      why += options_.access_key.empty()
                 ? ": it asks for credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                 : ": these credentials may not do that; look at them and at the bucket's policy";
    }
    return Ended{id, outcome, std::move(why), {}, {}};
  };
  if (code != CURLE_OK) {
    const char* const why = transfer.error[0] != '\0' ? transfer.error.data() : curl_.easy_strerror(code);
    return {id, StoreOutcome::kFailed, base_url_ + ": " + why, {}, {}};
  }
  if (status == 404) {
    const bool object = transfer.kind == Transfer::Kind::kGet && error_code != "NoSuchBucket";
    return ended(object ? StoreOutcome::kMissing : StoreOutcome::kRefused);
  }
  if (status == 416 && transfer.kind == Transfer::Kind::kGet) return ended(StoreOutcome::kShort);
  if (status == 408 || status == 429 || status >= 500) return ended(StoreOutcome::kFailed);
  if (status != (transfer.kind == Transfer::Kind::kGet ? 206 : 200)) return ended(StoreOutcome::kRefused);
  if (transfer.received.left() > 0) return ended(StoreOutcome::kShort);
  Ended done{id, StoreOutcome::kDone, {}, {}, {}};
  if (transfer.kind != Transfer::Kind::kList) return done;
  auto page = parse_s3_page(transfer.body);
  if (!page.ok()) return {id, StoreOutcome::kFailed, base_url_ + ": " + page.error().message, {}, {}};
  for (ListedObject& object : page.value().objects) {
    if (!object.path.starts_with(prefix_)) continue;
    done.objects.push_back({object.path.substr(prefix_.size()), object.bytes});
  }
  if (page.value().truncated) {
    if (done.objects.empty()) return {id, StoreOutcome::kFailed, base_url_ + ": lists what was not asked for", {}, {}};
    done.next = done.objects.back().path;
  }
  return done;
}

}  // namespace flexkv::remote
