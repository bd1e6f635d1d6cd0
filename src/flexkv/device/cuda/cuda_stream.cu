#include <algorithm>
#include <numeric>

#include "flexkv/base/time.h"
#include "flexkv/device/cuda/cuda_stream.h"

namespace flexkv::device {
namespace {

void* pointer(std::uint64_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

CudaStream::CudaStream(std::shared_ptr<Context> context, std::shared_ptr<const PinnedPool> pinned,
                       std::unique_ptr<Stream> stream, std::unique_ptr<Staging> staging, std::unique_ptr<Sums> sums,
                       Direction direction, const layout::BlockLayout& layout, std::span<std::byte> pool,
                       std::uint64_t max_pitch)
    : context_(context),
      pinned_(std::move(pinned)),
      stream_(std::move(stream)),
      staging_(std::move(staging)),
      sums_(std::move(sums)),
      direction_(direction),
      layout_(layout),
      pool_(pool),
      max_pitch_(max_pitch),
      done_(context),
      marks_{Mark(context), Mark(context), Mark(context), Mark(context), Mark(context), Mark(context)} {
  const auto add = [&](std::span<const layout::Rectangle> rectangles) {
    plans_.push_back({rectangles, std::vector<bool>(rectangles.size(), false)});
  };
  add(layout_.rectangles());
  for (const layout::Part& part : layout_.parts()) add(part.rectangles);
  targets_.reserve(kGroup);
  sources_.reserve(kGroup);
  sizes_.reserve(kGroup);
}

CudaStream::~CudaStream() { (void)synchronize(); }

Status CudaStream::order_after(const EngineEvent& event) {
  if (failed_) return *failed_;
  const auto* cuda_event = dynamic_cast<const CudaEngineEvent*>(&event);
  FLEXKV_ASSERT(cuda_event != nullptr);
  ContextScope scope(*context_);
  if (!scope.ok()) return keep(scope.status());
  Status status = cuda_event->event.order(stream_->get());
  if (status && staging_ != nullptr) status = staging_->order_after(cuda_event->event);
  if (status && sums_ != nullptr) status = sums_->order_after(cuda_event->event);
  return keep(std::move(status));
}

Status CudaStream::submit(std::span<const BlockCopy> copies, std::size_t part) {
  if (failed_) return *failed_;
  if (Status status = check_copies(copies, layout_, pool_.size()); !status) return status;
  FLEXKV_ASSERT(part == kAllParts || part < layout_.parts().size());
  ContextScope scope(*context_);
  if (!scope.ok()) return keep(scope.status());
  if (staging_ != nullptr && pace_.stage(monotonic_now())) return keep(submit_staged(copies, part));
  staged_since_mark_ = false;
  Plan& plan = plans_[part == kAllParts ? 0 : part + 1];
  Status status;
  for (std::size_t i = 0; i < copies.size() && status; ++i) status = queue_block(copies[i], plan);
  if (status) status = flush_batch();
  return keep(std::move(status));
}

Status CudaStream::sum(std::span<const BlockCopy> copies, std::span<std::uint64_t> sums) {
  if (failed_) return *failed_;
  FLEXKV_ASSERT(direction_ == Direction::kToHost);
  if (Status status = check_copies(copies, layout_, pool_.size()); !status) return status;
  if (sums_ == nullptr) return {};
  ContextScope scope(*context_);
  if (!scope.ok()) return keep(scope.status());
  return keep(sums_->submit(copies, sums));
}

Status CudaStream::submit_staged(std::span<const BlockCopy> copies, std::size_t part) {
  const StagedStretch& stretch = staging_->stretch(part);
  Status status = staging_->check_memory();
  while (!copies.empty() && status) {
    const auto round = copies.first(std::min(copies.size(), stretch.blocks_at_once()));
    copies = copies.subspan(round.size());
    status = staging_->make_room(stream_->get());
    if (status) status = queue_staged(round, stretch);
    if (status) status = staging_->scatter(round, stretch, stream_->get());
  }
  return status;
}

Status CudaStream::queue_staged(std::span<const BlockCopy> copies, const StagedStretch& stretch) {
  Status status;
  for (std::size_t i = 0; i < copies.size() && status; ++i) {
    std::byte* host = pool_.data() + copies[i].host_offset + stretch.host_begin;
    status = queue_run(staging_->address(i, stretch), host, stretch.bytes, pinned_->covers(host, stretch.bytes));
  }
  return status ? flush_batch() : status;
}

Status CudaStream::join() { return staging_ != nullptr ? staging_->join(stream_->get()) : Status{}; }

Status CudaStream::queue_block(const BlockCopy& copy, Plan& plan) {
  std::byte* extent = pool_.data() + copy.host_offset;
  const bool whole = !crosses_pieces(extent, layout_.shard_bytes());
  const bool pinned = pinned_->covers(extent, layout_.shard_bytes());
  for (std::size_t i = 0; i < plan.rectangles.size(); ++i) {
    const layout::Rectangle& rectangle = plan.rectangles[i];
    const std::uint64_t address = rectangle.address + copy.device_block * rectangle.block_stride;
    std::byte* host = extent + rectangle.host_offset;
    const bool pitch_fits = std::max<std::uint64_t>(rectangle.row_step, rectangle.host_step) <= max_pitch_;
    if (whole && rectangle.rows > 1 && pitch_fits && !plan.by_row[i]) {
      const cudaError_t result = queue_rectangle(rectangle, address, host);
      // A rectangle whose rows lie in several allocations is refused, and nothing of it copied.
      plan.by_row[i] = result == cudaErrorInvalidValue;
      if (Status status = checked(result, "cudaMemcpy2DAsync"); !status && !plan.by_row[i]) return status;
      if (!plan.by_row[i]) {
        if (Status status = count(1, std::size_t{rectangle.row_bytes} * rectangle.rows); !status) return status;
        continue;
      }
    }
    for (std::uint64_t row = 0; row < rectangle.rows; ++row) {
      Status status =
          queue_run(address + row * rectangle.row_step, host + row * rectangle.host_step, rectangle.row_bytes, pinned);
      if (!status) return status;
    }
  }
  return {};
}

cudaError_t CudaStream::queue_rectangle(const layout::Rectangle& r, std::uint64_t address, std::byte* host) {
  return direction_ == Direction::kToHost
             ? cudaMemcpy2DAsync(host, r.host_step, pointer(address), r.row_step, r.row_bytes, r.rows,
                                 cudaMemcpyDeviceToHost, stream_->get())
             : cudaMemcpy2DAsync(pointer(address), r.row_step, host, r.host_step, r.row_bytes, r.rows,
                                 cudaMemcpyHostToDevice, stream_->get());
}

Status CudaStream::queue_run(std::uint64_t address, std::byte* host, std::size_t bytes, bool pinned) {
  while (bytes > 0) {
    const std::size_t to_boundary = kPinPiece - reinterpret_cast<std::uintptr_t>(host) % kPinPiece;
    const std::size_t step = std::min(bytes, to_boundary);
    const bool to_host = direction_ == Direction::kToHost;
    targets_.push_back(to_host ? host : pointer(address));
    sources_.push_back(to_host ? pointer(address) : host);
    sizes_.push_back(step);
    // Only pinned memory is known to work in batched calls.
    if (!pinned || targets_.size() == kGroup) {
      if (Status status = flush_batch(); !status) return status;
    }
    address += step;
    host += step;
    bytes -= step;
  }
  return {};
}

Status CudaStream::flush_batch() {
  const std::size_t size = targets_.size();
  Status status;
#if CUDART_VERSION >= 13000
  if (size > 1) {
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    std::size_t first = 0;
    status = checked(cudaMemcpyBatchAsync(targets_.data(), sources_.data(), sizes_.data(), size, &attributes, &first, 1,
                                          stream_->get()),
                     "cudaMemcpyBatchAsync");
  } else
#endif
  {
    const cudaMemcpyKind kind = direction_ == Direction::kToHost ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    for (std::size_t i = 0; i < size && status; ++i) {
      status = checked(cudaMemcpyAsync(targets_[i], sources_[i], sizes_[i], kind, stream_->get()), "cudaMemcpyAsync");
    }
  }
  const std::size_t bytes = std::accumulate(sizes_.begin(), sizes_.end(), std::size_t{0});
  targets_.clear();
  sources_.clear();
  sizes_.clear();
  return status ? count(size, bytes) : status;
}

Status CudaStream::count(std::size_t copies, std::size_t bytes) {
  copies_since_mark_ += copies;
  bytes_since_mark_ += bytes;
  if (copies_since_mark_ < kGroup && bytes_since_mark_ < kGroupBytes) return {};
  Mark& mark = marks_[next_mark_];
  mark.bytes = std::exchange(bytes_since_mark_, 0);
  mark.staged = std::exchange(staged_since_mark_, true);
  copies_since_mark_ = 0;
  if (Status status = mark.event.record(stream_->get()); !status) return status;
  // This group and the three before it may be in flight.
  const Mark& passed = marks_[(next_mark_ + 2) % kMarks];
  const Mark& before = marks_[(next_mark_ + 1) % kMarks];
  next_mark_ = (next_mark_ + 1) % kMarks;
  if (Status status = passed.event.wait(); !status) return status;
  if (passed.bytes > 0 && before.bytes > 0) {
    Result<Nanos> took = passed.event.since(before.event);
    if (!took) return took.error();
    pace_.arrived(monotonic_now(), took.value(), passed.bytes, passed.staged);
  }
  return {};
}

Status CudaStream::synchronize() {
  ContextScope scope(*context_);
  if (!scope.ok()) return keep(scope.status());
  if (sums_ != nullptr) (void)keep(sums_->collect());
  if (!failed_) {
    Status status = join();
    if (status) status = done_.record(stream_->get());
    if (status) status = done_.wait();
    for (Mark& mark : marks_) mark.bytes = 0;
    if (status) return status;
    (void)keep(std::move(status));
  }
  // A failed stream may still have copies in flight. When this fails as well the context is lost, and with it they are.
  (void)checked(cudaStreamSynchronize(stream_->get()), "cudaStreamSynchronize");
  if (staging_ != nullptr) staging_->synchronize();
  return *failed_;
}

Status CudaStream::order_engine(cudaStream_t engine_stream) {
  return after_all([&](cudaStream_t stream) {
    Status status = done_.record(stream);
    return status ? done_.order(engine_stream) : status;
  });
}

Status CudaStream::keep(Status status) {
  if (!status && !failed_) failed_ = status.error();
  return status;
}

}  // namespace flexkv::device
