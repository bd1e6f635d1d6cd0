#include "flexkv/disk/check.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "flexkv/disk/directory.h"

namespace flexkv::disk {
namespace {

constexpr std::size_t kRecordsAtOnce = 1024;
constexpr std::size_t kProblemsMax = 20;

// Bytes read; less than asked for at the end of the file or on an error, which errno then tells (0: none).
std::size_t read_at(int fd, std::uint64_t offset, std::span<std::byte> out) {
  std::size_t done = 0;
  errno = 0;
  while (done < out.size()) {
    const ssize_t count = ::pread(fd, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    done += static_cast<std::size_t>(count);
  }
  return done;
}

class Checker {
 public:
  Checker(std::string directory, std::uint64_t rate, std::uint64_t total,
          const std::function<void(std::uint64_t, std::uint64_t)>& progress, const CheckClock& clock)
      : directory_(std::move(directory)), rate_(rate), total_(total), progress_(progress), clock_(clock) {}

  void check_space(const SpaceId& space) {
    const SpaceCodec names(space, kHeaderBytes);
    const Fd records(::open((directory_ + "/" + names.records_name()).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    const Fd blocks(::open((directory_ + "/" + names.blocks_name()).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    HeaderPage page{};
    if (!records.valid() || !blocks.valid() || read_at(records.get(), 0, page) < page.size()) {
      return tell(names.records_name() + ": the pair of files is not whole: its blocks are not found by a node");
    }
    Header header;
    const HeaderFault fault = decode_header(page, space, 0, header);
    if (fault == HeaderFault::kVersion) return tell(version_refusal(names.records_name()));
    if (fault != HeaderFault::kNone && fault != HeaderFault::kOtherSlots) {
      return tell(names.records_name() + ": " + fault_name(fault) + ": its blocks are not found by a node");
    }
    if (header.slot_bytes == 0 || header.slot_bytes > kSlotBytesMax) {
      return tell(names.records_name() + ": slots of " + std::to_string(header.slot_bytes) + " bytes");
    }
    const SpaceCodec codec(space, header.slot_bytes);
    payload_.resize(header.slot_bytes);
    std::vector<std::byte> bytes(kRecordsAtOnce * kRecordBytes);
    for (std::uint32_t first = 0;; first += kRecordsAtOnce) {
      const std::size_t got = read_at(records.get(), kHeaderBytes + std::uint64_t{first} * kRecordBytes, bytes);
      for (std::uint32_t i = 0; i < got / kRecordBytes; ++i) {
        Record record;
        const std::span<const std::byte, kRecordBytes> at(bytes.data() + i * kRecordBytes, kRecordBytes);
        const auto found = codec.decode(at, first + i, record);
        if (found == SpaceCodec::Found::kDamaged)
          tell(codec.records_name() + ": record " + std::to_string(first + i) + " is damaged");
        if (found == SpaceCodec::Found::kRecord && record.epoch == header.epoch)
          check_block(codec, blocks.get(), first + i, record);
      }
      if (got < bytes.size()) return;
    }
  }

  CheckReport& report() { return report_; }

 private:
  static constexpr std::uint64_t kSlotBytesMax = 1ULL << 40;

  void check_block(const SpaceCodec& codec, int fd, std::uint32_t index, const Record& record) {
    ++report_.blocks;
    report_.bytes += payload_.size();
    const std::string where = codec.blocks_name() + ": block " + std::to_string(index);
    if (read_at(fd, index * codec.slot_bytes(), payload_) < payload_.size()) {
      ++report_.unreadable_blocks;
      tell(where + " cannot be read: " + (errno == 0 ? "the file is too short" : std::strerror(errno)));
    } else if (codec.payload_checksum(record.key, record.epoch, payload_) != record.checksum) {
      ++report_.bad_blocks;
      tell(where + ": its checksum is wrong");
    }
    // What nobody is going to read again should not push others out of the page cache.
    (void)::posix_fadvise(fd, static_cast<off_t>(index * codec.slot_bytes()), static_cast<off_t>(payload_.size()),
                          POSIX_FADV_DONTNEED);
    if (rate_ > 0) {
      const auto due = static_cast<Nanos>(static_cast<double>(report_.bytes) / static_cast<double>(rate_) * kSecond);
      if (const Nanos early = begun_ + due - clock_.now(); early > 0) clock_.sleep(early);
    }
    if (clock_.now() - told_ < kSecond / 10) return;
    told_ = clock_.now();
    progress_(report_.bytes, std::max(total_, report_.bytes));
  }

  void tell(std::string problem) {
    if (report_.problems.size() < kProblemsMax) report_.problems.push_back(std::move(problem));
  }

  const std::string directory_;
  const std::uint64_t rate_;
  const std::uint64_t total_;
  const std::function<void(std::uint64_t, std::uint64_t)>& progress_;
  const CheckClock& clock_;
  const Nanos begun_ = clock_.now();
  Nanos told_ = 0;
  std::vector<std::byte> payload_;
  CheckReport report_;
};

}  // namespace

Result<CheckReport> check(const std::string& path, std::uint64_t bytes_per_second,
                          const std::function<void(std::uint64_t, std::uint64_t)>& progress, const CheckClock& clock) {
  auto directory = Directory::open_existing(path);
  if (!directory) return directory.error();
  auto spaces = directory.value().list();
  if (!spaces) return spaces.error();
  std::uint64_t total = 0;
  for (const auto& [space, found] : spaces.value()) total += found.bytes;
  Checker checker(path, bytes_per_second, total, progress, clock);
  for (const auto& [space, found] : spaces.value()) checker.check_space(space);
  return std::move(checker.report());
}

}  // namespace flexkv::disk
