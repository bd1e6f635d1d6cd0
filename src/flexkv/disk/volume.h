// One directory of the tier with its drive: the files of all spaces there, the transfers in flight, the room they may
// take. Used by DiskTier and Opening only.
//
// Threads: public methods are thread-safe and do not block, but for start() and close(). Blocking calls to the drive
// run on the volume's own lane, checksums on the workers of the tier, what follows a completion on the drive's thread.
// The mutex is never held while a drive, a sink or a callback is called.
#pragma once

#include <condition_variable>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flexkv/disk/commit.h"
#include "flexkv/disk/lane_calls.h"
#include "flexkv/disk/types.h"
#include "flexkv/disk/workers.h"

namespace flexkv::disk {

class Volume final : public file::DriveSink {
 public:
  struct Environment {
    const TierOptions& options;
    TierSink& sink;
    Workers& checksums;
    unsigned drive_count;
  };
  // What ended, and how; `error_number` if it failed.
  using Ended = std::function<void(Outcome, int error_number)>;
  using Buffer = std::shared_ptr<std::vector<std::byte>>;

  Volume(unsigned number, const VolumeSpec& spec, std::uint64_t share_bytes, const Environment& environment,
         std::unique_ptr<Workers> lane);
  ~Volume() override;

  void start(const VolumeSpec& spec);
  // Waits at most `patience` for what is in flight. False: the drive hangs with buffers in its hands, and may touch
  // them for the rest of the process's life; so this object must live that long. What the drive says is ignored
  // afterwards; jobs of the lane, and of the workers for checksums, may still run.
  bool close(Nanos patience);
  // Ends the lane, on which the files are closed. False: it hangs in a call to the drive, and will do nothing any more
  // when that ends; but this object must live as long. REQUIRES: close() was called, the workers for checksums have
  // stopped
  bool end();

  // ---- volume_ops.cc
  Admission write(const WriteOp& op, std::uint32_t index, std::uint64_t sequence);
  Admission read(const ReadOp& op, std::uint32_t index);
  void cancel(OpId id);

  // ---- volume_spaces.cc. `then` is called once, on any thread; when the drive goes off meanwhile it is called with
  // that as `why_not`, and the files are to be closed as if they had been opened.
  struct Found {
    std::string why_not{};  // not empty: the space has no place here
    bool any_file = false;  // there were records
    HeaderFault fault = HeaderFault::kDamaged;
    Header header{};
  };
  void begin_open(SpaceHandle space, const SpaceCodec& codec, std::function<void(Found)> then);
  struct Adopted {
    std::string why_not{};
    std::string dropped{};  // why records that were there are gone
    std::uint32_t slots_max = 0;
    std::uint32_t slots_on_file = 0;
    std::uint32_t record_count = 0;
  };
  // Makes the files fit and puts the epoch into their header.
  // `written_epoch`: that of the header there, 0 if it does not count.
  void adopt(SpaceHandle space, std::uint64_t epoch, std::uint64_t written_epoch, std::function<void(Adopted)> then);
  void read_records(SpaceHandle space, std::uint32_t first, std::uint32_t count, Nanos deadline,
                    std::function<void(Outcome, int, Buffer)> then);
  void finish_open(SpaceHandle space);
  // `ended`: once the epoch is on stable storage, or could not be put there: then it is tried again with later writes
  // and when the drive comes back. False: the space has no files here; `ended` will not be called.
  bool reset(SpaceHandle space, std::uint64_t epoch, Ended ended);
  // REQUIRES: no transfer is under way
  void close_space(SpaceHandle space);
  void remove_closed(std::span<const std::uint8_t> id_prefix);
  // Runs it on the lane, where it may block, once all is gone that was to be removed until now. Never if something
  // could not be removed, or the drive is off then.
  void when_removed(Job then);

  const std::string& directory() const { return directory_; }
  std::uint32_t queued() const;
  VolumeStats stats() const;
  void register_memory(std::span<std::byte> memory);

  // ---- DriveSink
  void on_completions(std::span<const file::Completion> completions) override;
  void on_overdue(std::uint64_t tag) override;
  void on_availability(bool available, const std::string& why) override;

 private:
  struct Transfer;
  struct FreeBytes {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  enum class State : std::uint8_t { kOpening, kOpen, kClosing };
  struct SpaceFiles {
    explicit SpaceFiles(const SpaceCodec& space_codec) : codec(space_codec) {}
    const SpaceCodec codec;
    SpaceHandle handle{};
    State state = State::kOpening;
    bool doomed = false;  // to be removed once it is closed
    file::FileId blocks{};
    file::FileId records{};
    std::uint64_t blocks_bytes = 0;
    std::uint64_t records_bytes = 0;
    std::uint32_t slots_on_file = 0;
    std::uint32_t slots_max = 0;
    std::uint64_t epoch = 0;
    std::uint64_t synced_epoch = 0;  // of the header on stable storage
    // Transfers, records to commit, requests of the volume's own, growing; the object stays until there are none.
    std::uint32_t in_flight = 0;
    std::vector<Transfer*> waiting_for_room;
    bool growing = false;
    Nanos no_room_until = 0;
    bool told_no_room = false;
    bool told_damaged = false;
    std::vector<PendingRecord> commit_waiting;
    bool committing = false;
    std::vector<Ended> header_waiting;
    std::vector<Ended> header_now;  // who waits for the one being written
    bool header_active = false;
    std::unordered_map<std::uint32_t, std::uint32_t> failures;  // of reads, by slot
  };
  struct CommitGroup;
  // An answer that somebody waits for; not longer than the drive serves.
  using Answer = std::function<void(const std::string& why_not)>;
  // A request of the tier's own.
  struct Internal {
    SpaceFiles* files = nullptr;
    Buffer buffer;
    Ended ended;  // empty: nobody waits for it any more
  };
  // What a change under the mutex leads to outside of it.
  struct Actions {
    std::optional<Health> health;
    bool tells_short = false;  // a file that something else cut off
    std::vector<Completion> completions;
    std::vector<Transfer*> verify;
    std::vector<std::pair<Ended, std::pair<Outcome, int>>> ended;
    std::vector<SpaceFiles*> landed;  // a request of its own is over
    std::vector<SpaceHandle> commit;
    std::vector<SpaceHandle> close;
  };
  enum Part : std::uint64_t { kPayload = 0, kRecord = 1, kInternal = 2 };

  SpaceFiles* find(SpaceHandle space, State state);
  std::uint64_t promise(Answer give_up);
  bool keep_promise(std::uint64_t number);
  void act(Actions& actions);
  void run(SpaceFiles& files, file::Op op, file::FileId file, std::uint64_t offset, Buffer buffer, Nanos deadline,
           Ended ended);
  void set_health(const Health& health, Actions& actions);
  void note_write_error(int error_number, Actions& actions);
  void drop_flight(SpaceFiles& files, std::uint32_t count, Actions& actions);

  Admission admit_write(const SpaceFiles& files, std::uint32_t index) const;
  void prepare_write(Transfer& transfer);
  void start_write(Transfer& transfer);
  void submitted(OpId id);
  void verify(Transfer& transfer);
  void part_ended(Transfer& transfer, const file::Completion& completion, Actions& actions);
  void finish(Transfer& transfer, Outcome outcome, int error_number, Actions& actions);
  void note_bad_slot(SpaceFiles& files, std::uint32_t index);

  void commit(SpaceHandle space);
  void write_records(const std::shared_ptr<CommitGroup>& group);
  void record_written(const std::shared_ptr<CommitGroup>& group, Outcome outcome, int error_number);
  void end_commit(CommitGroup& group, Outcome outcome, int error_number);

  // On the lane, but for the first three.
  bool want_header(SpaceFiles& files, Ended ended);
  void write_header(SpaceFiles& files);
  void write_first_header(SpaceFiles& files, unsigned tries, Adopted adopted, std::function<void(Adopted)> then);
  void end_header(SpaceFiles& files, std::uint64_t epoch, Outcome outcome, int error);
  void give_up_headers(SpaceFiles& files, Actions& actions);
  void prepare_open(SpaceHandle space, const SpaceCodec& codec, std::uint64_t promise,
                    const std::function<void(Found)>& then);
  Status open_files(SpaceFiles& files);
  Status recreate(SpaceFiles& files);
  Status cut(SpaceFiles& files, std::uint64_t blocks_bytes, std::uint64_t records_bytes);
  Adopted settle(SpaceFiles& files, bool keep);
  void close_files(SpaceHandle space);
  std::uint64_t measure(SpaceFiles& files);
  void remove_idle(const SpaceId& space);
  bool remove_oldest();
  void make_room(std::uint64_t bytes);
  void fit_share();
  void cut_idle(const SpaceId& space);
  void grow(SpaceFiles& files);
  std::uint32_t grow_to(SpaceFiles& files, std::uint32_t needed);
  Status allocate(SpaceFiles& files, std::uint32_t slots);
  std::uint32_t slots_that_fit(std::uint64_t bytes, std::uint64_t slot_bytes) const;

  const unsigned number_;
  const std::string directory_;
  const std::uint64_t share_bytes_;
  const Environment environment_;
  const std::shared_ptr<WriteMeter> meter_;  // null: all is granted
  std::unique_ptr<Workers> lane_;
  std::unique_ptr<file::Drive> drive_;  // null: the volume is off for good
  LaneCalls calls_{drive_};

  mutable std::mutex mutex_;
  std::condition_variable quiet_;
  bool closing_ = false;
  bool abandoned_ = false;
  bool quiet_drive_ = false;  // once closed: it has no buffers any more
  Health health_;
  bool available_ = true;
  std::string off_why_;
  std::string no_writes_why_;  // empty: writes are taken
  Nanos no_writes_until_ = 0;
  std::map<SpaceHandle, std::unique_ptr<SpaceFiles>> spaces_;
  FoundSpaces idle_;  // nobody has them open
  std::int64_t closed_count_ = 0;
  std::vector<std::pair<SpaceId, Job>> waiting_opens_;
  std::vector<Job> waiting_removals_;  // when_removed()
  bool removal_failed_ = false;        // of anything, ever
  std::map<std::uint64_t, Answer> promises_;
  std::uint64_t next_promise_ = 0;
  std::uint64_t used_bytes_;
  std::unordered_map<OpId, std::unique_ptr<Transfer>> transfers_;
  std::unordered_map<std::uint64_t, Internal> internals_;
  std::uint64_t next_internal_ = 0;
  std::uint32_t queued_ = 0;
  VolumeStats stats_;
};

struct Volume::Transfer {
  OpId id = 0;
  bool write = false;
  SpaceFiles* files = nullptr;
  std::uint32_t index = 0;
  key::BlockKey key;
  key::BlockKey parent;
  std::span<std::byte> bytes;
  std::unique_ptr<std::byte, FreeBytes> own_bytes{};  // of a block that is only verified
  std::vector<SummedExtent> sums;
  file::Urgency urgency{};
  Nanos deadline = 0;
  std::uint64_t epoch = 0;
  std::uint64_t sequence = 0;
  RecordBytes record{};     // to be written, or as it was read
  std::uint32_t parts = 0;  // requests that the drive has
  Outcome outcome = Outcome::kDone;
  int error_number = 0;
  bool canceled = false;
  bool overdue = false;

  std::uint32_t requests() const { return write ? 1 : 2; }
};

}  // namespace flexkv::disk
