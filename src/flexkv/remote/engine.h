// What the remote tier does, without its thread: turns reads and writes of blocks into operations on objects, checks
// what comes, keeps the catalog of what is stored, and scans the store for what others wrote. Its time comes in as a
// parameter. contains(), stats(), takes_writes() and object_blocks() may be called by any thread; all else by one (the
// lane).
#pragma once

#include <algorithm>
#include <functional>
#include <memory>

#include "flexkv/base/mutex.h"
#include "flexkv/meta/backoff.h"
#include "flexkv/remote/catalog.h"
#include "flexkv/remote/dispatch.h"

namespace flexkv::remote {

struct EngineOptions {
  DispatchLimits dispatch;
  std::uint64_t object_bytes = 8 << 20;  // an object has as many blocks as fit, but at least one; so has one read of it
  std::uint64_t blocks_max = 4 << 20;    // known at once, of all spaces
  Nanos scan_every = 60 * kSecond;       // after the end of one; sooner when one failed
  std::uint64_t seed = 0;                // of the random part of waiting times
};

class Engine {
 public:
  // Both outlive the engine.
  Engine(EngineOptions options, Store& store, RemoteSink& sink);
  ~Engine();

  // How many leading ones of `keys` can be read, as far as is known. From memory only. Thread-safe.
  std::size_t contains(const SpaceName& space, std::span<const key::BlockKey> keys) const;
  RemoteStats stats() const;
  bool takes_writes() const;  // thread-safe
  std::uint64_t object_blocks(std::uint64_t slot_bytes) const;

  // Known already with the same slots: nothing happens.
  void open_space(const SpaceName& space, std::uint64_t slot_bytes, Nanos now);
  // What is under way goes on.
  void close_space(const SpaceName& space);
  // REQUIRES: problem_of(request) is empty
  void read(ReadRequest request, Nanos now);
  void write(WriteRequest request, Nanos now);
  void cancel(RequestId id);
  // As if its deadline were now.
  void give_up(RequestId id, Nanos now);
  void watch_marks(Nanos now);
  // REQUIRES: watch_marks()
  void put_mark(const Mark& mark, Nanos now);
  void end_all();

  void take(std::vector<Ended>& ended, Nanos now);
  void on_time(Nanos now);
  std::optional<Nanos> next_time() const;

 private:
  struct Space {
    Space(const SpaceName& name, std::uint64_t slot_bytes, Catalog::Room& room)
        : codec(name, slot_bytes), catalog(room) {}
    const ObjectCodec codec;
    Catalog catalog;  // guarded by mutex_
    Nanos scan_at = 0;
  };
  struct Reading {
    ReadRequest asked;
    std::shared_ptr<Space> space;
    std::size_t want = 0;              // leading blocks
    Outcome outcome = Outcome::kDone;  // once they are there
    std::size_t next = 0;              // to be told of
    std::vector<bool> there;
    std::set<OpId> ops;
  };
  // Of one request: blocks [first, first + count) lie one after another in one object.
  struct Piece {
    ObjectName object;
    std::uint32_t index = 0;  // of the first one in the object
    std::size_t first = 0;
    std::size_t count = 0;
    std::vector<BlockHead> heads;
  };
  struct Writing {
    WriteRequest asked;
    std::shared_ptr<Space> space;
    Outcome outcome = Outcome::kDone;
    std::set<OpId> ops;
  };
  struct Scan {
    std::shared_ptr<Space> space;
    std::vector<ObjectName> unknown;  // whose headers are to be read
    std::string next;                 // page
    std::set<OpId> ops;
  };

  struct Marks {
    explicit Marks(const EngineOptions& options)
        : backoff(kSecond, std::max(options.scan_every, kSecond), options.seed) {}
    std::set<Mark> known;
    std::set<Mark> unstored;  // of them
    std::set<Mark> listing;   // seen, of a listing under way
    bool listed = false;      // once at least
    std::set<OpId> ops;
    Nanos due = 0;  // next listing
    meta::Backoff backoff;
    std::string why_unread;  // the latest listing failed
    std::string why_unwritten;
  };

  std::shared_ptr<Space> find_space(const SpaceName& name, std::uint64_t slot_bytes) const;
  std::vector<Piece> pieces_of(Reading& reading) const;
  void order_read(RequestId id, Reading& reading, Piece piece);
  void take_piece(RequestId id, OpId op, Piece& piece, StoreOutcome outcome);
  void stop_at(Reading& reading, std::size_t block, Outcome outcome);
  void tell(RequestId id);
  void end_reading(RequestId id, Outcome outcome);
  void order_write(RequestId id, Writing& writing, std::size_t first, std::size_t count);
  void end_writing(RequestId id, Outcome outcome);
  void blame(Space& space, const ObjectName& object, Fault fault);
  void end_overdue(Nanos now);
  void publish();

  // engine_scan.cc
  void begin_due_scan(Nanos now);
  void list_page(std::string from);
  void take_page(Ended& ended);
  void read_headers();
  void read_header(const ObjectName& name);
  void go_on_scanning();
  void end_scan(bool whole);
  void drop_scan();

  // engine_marks.cc
  void look_for_marks();
  void list_marks(std::string from);
  void take_marks();
  void try_writing(std::string path, std::vector<std::byte> bytes, std::function<void()> done);
  void store_marks();
  void end_looking(std::string why);

  const EngineOptions options_;
  RemoteSink& sink_;
  Dispatch dispatch_;
  std::unordered_map<RequestId, Reading> readings_;
  std::unordered_map<RequestId, Writing> writings_;
  std::set<std::pair<Nanos, RequestId>> deadlines_;
  std::optional<Scan> scan_;
  meta::Backoff scan_backoff_;
  std::optional<Marks> marks_;  // once they are watched
  Nanos now_ = 0;
  RemoteStats counts_;

  mutable Mutex mutex_;
  Catalog::Room room_ FLEXKV_GUARDED_BY(mutex_);
  std::map<SpaceName, std::shared_ptr<Space>> spaces_ FLEXKV_GUARDED_BY(mutex_);
  RemoteStats published_ FLEXKV_GUARDED_BY(mutex_);
};

}  // namespace flexkv::remote
