#include "changes.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>

#include "flexkv/events/follower.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flexkv::bind {
namespace {

nb::bytes to_bytes(const std::string& text) { return nb::bytes(text.data(), text.size()); }

// Of a node in this process, for one thread.
class PyChanges {
 public:
  explicit PyChanges(std::shared_ptr<server::NodeServer> node) : node_(std::move(node)) {
    auto fd = node_->changes_fd();
    if (!fd) throw std::runtime_error(fd.error().message);
    fd_ = fd.value();
  }

  int fileno() const { return fd_; }

  nb::list take() {
    std::vector<events::Change> news;
    {
      nb::gil_scoped_release release;
      std::vector<events::Change> changes;
      more_ = node_->read_changes(subscription_, 0, changes);
      for (const events::Change& change : changes) follower_.apply(change, news);
    }
    return change_list(std::move(news));
  }

  bool more() const { return more_; }
  nb::list told() const { return change_list(follower_.told()); }

 private:
  std::shared_ptr<server::NodeServer> node_;
  int fd_ = -1;
  bool more_ = false;
  events::Subscription subscription_;
  events::Follower follower_{true};
};

}  // namespace

nb::list change_list(std::vector<events::Change> changes) {
  using Kind = events::Change::Kind;
  nb::list out;
  for (const events::Change& change : changes) {
    if (change.kind == Kind::kCleared) {
      out.append(nb::make_tuple("cleared", 0, nb::bytes(), nb::bytes(), nb::list(), nb::bytes()));
      continue;
    }
    const events::Description& known = *change.description;
    nb::list tokens;
    if (change.kind == Kind::kAdded) {
      for (const std::uint32_t token : known.tokens) tokens.append(token);
    }
    out.append(nb::make_tuple(change.kind == Kind::kAdded ? "added" : "removed", change.tier, to_bytes(known.hash),
                              to_bytes(known.parent_hash), tokens, to_bytes(*known.details)));
  }
  return out;
}

std::vector<proto::DescribeRequest> describe_requests(std::uint32_t first,
                                                      std::span<const std::span<const std::byte>> hashes,
                                                      const std::vector<std::uint32_t>& tokens,
                                                      const std::vector<nb::bytes>& details) {
  const auto text = [](std::span<const std::byte> hash) {
    return std::string(reinterpret_cast<const char*>(hash.data()), hash.size());
  };
  const auto wrong = [] { throw nb::value_error("blocks, hashes, tokens and details do not fit together"); };
  std::vector<proto::DescribeRequest> requests;
  if (first >= hashes.size()) return requests;
  const auto count = static_cast<std::uint32_t>(hashes.size() - first);
  if (tokens.empty() || tokens.size() % count != 0) wrong();
  const std::size_t block_tokens = tokens.size() / count;
  const std::size_t fitting = proto::kDescribedBytesMax / sizeof(std::uint32_t) / block_tokens;
  const auto most = static_cast<std::uint32_t>(std::min(fitting, proto::kDescribedBlocksMax));
  if (most == 0 || (details.size() != 1 && details.size() != count)) wrong();
  for (std::uint32_t begin = 0; begin < count; begin += most) {
    const std::uint32_t end = std::min(count, begin + most);
    proto::DescribeRequest request;
    request.first_block = first + begin;
    if (request.first_block > 0) request.parent_hash = text(hashes[request.first_block - 1]);
    for (std::uint32_t i = begin; i < end; ++i) request.hashes.push_back(text(hashes[first + i]));
    request.tokens.assign(tokens.begin() + static_cast<std::ptrdiff_t>(begin * block_tokens),
                          tokens.begin() + static_cast<std::ptrdiff_t>(end * block_tokens));
    for (std::size_t i = begin; i < end && i < details.size(); ++i) {
      request.details.emplace_back(details[i].c_str(), details[i].size());
    }
    if (request.details.empty()) request.details.emplace_back(details[0].c_str(), details[0].size());
    if (!proto::valid(request)) wrong();
    requests.push_back(std::move(request));
  }
  return requests;
}

void bind_changes(nb::module_& m) {
  nb::class_<PyChanges>(m, "Changes",
                        "Which blocks a node comes to keep and loses, of those that engines describe. For one thread.")
      .def("fileno", &PyChanges::fileno, "Readable while there may be changes to take.")
      .def("take", &PyChanges::take,
           "What has changed since the last call, of some thousand changes at a time: (kind, tier, hash, hash before, "
           "tokens, details), kind being 'added', 'removed' or, when nothing is left, 'cleared'.")
      .def("more", &PyChanges::more, "Whether the last take() left some.")
      .def("told", &PyChanges::told, "All that was added and not removed, as take() gave it, parents first.");
}

nb::object follow_node(std::shared_ptr<server::NodeServer> node) {
  return nb::cast(std::make_unique<PyChanges>(std::move(node)));
}

}  // namespace flexkv::bind
