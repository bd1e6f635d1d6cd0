// A mutex that clang's thread-safety analysis understands (std::mutex is not annotated); g++ ignores the attributes.
#pragma once

#include <mutex>

#if defined(__clang__)
#define FLEXKV_TSA(x) __attribute__((x))
#else
#define FLEXKV_TSA(x)
#endif

#define FLEXKV_GUARDED_BY(m) FLEXKV_TSA(guarded_by(m))
#define FLEXKV_REQUIRES(...) FLEXKV_TSA(requires_capability(__VA_ARGS__))
#define FLEXKV_EXCLUDES(...) FLEXKV_TSA(locks_excluded(__VA_ARGS__))

namespace flexkv {

class FLEXKV_TSA(capability("mutex")) Mutex {
 public:
  void lock() FLEXKV_TSA(acquire_capability()) { mutex_.lock(); }
  void unlock() FLEXKV_TSA(release_capability()) { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

class FLEXKV_TSA(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) FLEXKV_TSA(acquire_capability(mutex)) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() FLEXKV_TSA(release_capability()) { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

}  // namespace flexkv
