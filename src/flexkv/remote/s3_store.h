// Objects in a bucket of an S3-compatible store, through libcurl on the lane that calls wait().
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "flexkv/remote/curl_library.h"
#include "flexkv/remote/location.h"

namespace flexkv::remote {

class S3Store final : public Store {
 public:
  static Result<std::unique_ptr<Store>> open(const Location& location, const S3Options& options);
  ~S3Store() override;

  unsigned width() const override;
  void begin(OpId id, PutOp op) override;
  void begin(OpId id, GetOp op) override;
  void begin(OpId id, ListOp op) override;
  void abandon(OpId id) override;
  void wait(std::optional<Nanos> until, std::vector<Ended>& ended) override;
  void wake() override;

 private:
  struct Transfer;

  S3Store(const CurlLibrary& curl, S3Options options, std::string base_url, std::string prefix);
  Transfer& add(OpId id, const std::string& url);
  void start(OpId id, Transfer& transfer);
  std::string url_of(const std::string& path) const { return base_url_ + prefix_ + path; }
  void move(std::vector<Ended>& ended);
  Ended end_of(OpId id, Transfer& transfer, CURLcode code) const;

  const CurlLibrary& curl_;
  const S3Options options_;
  const std::string base_url_;  // ends with '/'
  const std::string prefix_;    // empty, or ends with '/'
  CURLM* const multi_;
  std::unordered_map<OpId, std::unique_ptr<Transfer>> transfers_;
  std::atomic<bool> woken_ = false;
};

}  // namespace flexkv::remote
