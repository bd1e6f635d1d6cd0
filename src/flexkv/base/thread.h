// Threads that take no signals: in an engine's process they are for its own threads. (Python's handler of a signal that
// another thread took runs only once the main thread wakes up by itself, so an idle engine would not end on SIGTERM.)
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace flexkv {

// Throws std::system_error, as std::thread does. Thread-safe.
template <typename Body>
std::thread start_thread(Body&& body) {
  struct Blocked {
    Blocked() {
      sigset_t all;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~Blocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
    sigset_t before;
  } blocked;  // a thread begins with the mask of the one that starts it
  return std::thread(std::forward<Body>(body));
}

// For a thread that sleeps most of the time and on which others wait: asks for short slices of processor time. From
// Linux 6.12 such a thread, once woken up, need not wait for the end of another one's long slice, and gets no more time
// than before. Needs no privilege; other kernels, and threads of other scheduling classes, go on as they were.
void ask_for_short_slices();

}  // namespace flexkv
