// For tests: a simulated transport, whose every step the test chooses.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "flexkv/peer/one_sided.h"

namespace flexkv::peer::testing {

// Reads in two steps: the bytes, and then the lease's word.
class SimReads final : public OneSided {
 public:
  explicit SimReads(std::span<std::byte> pool) : pool_(pool) { show(); }
  // As another process would, that serves the same memory.
  void show() {
    Window window;
    window.transport = Transport::kNixl;
    window.pool = reinterpret_cast<std::uintptr_t>(pool_.data());
    window.pool_bytes = pool_.size();
    window.words = reinterpret_cast<std::uintptr_t>(memory_.data());
    window.word_count = kWords;
    window_ = std::make_shared<Window>(window);
  }
  void hide() { window_ = nullptr; }
  Transport transport() const override { return Transport::kNixl; }
  std::shared_ptr<const Window> window() const override { return window_; }
  std::span<const std::byte> pool() const override { return pool_; }
  LeaseWords& words() override { return words_; }
  bool fetch(const std::string& owner, const Window&, const Piece& piece, std::function<void(Fetched)> done) override {
    EXPECT_EQ(owner, "o");
    if (under_way.size() >= room || window_ == nullptr) return false;
    under_way.push_back({piece, std::move(done), {}});
    return true;
  }
  void forget(const std::string&) override {}
  bool end() override { return true; }

  struct Read {
    Piece piece;
    std::function<void(Fetched)> done;
    std::shared_ptr<std::vector<std::byte>> bytes;
  };
  using Position = std::list<Read>::iterator;
  void step(Position read) {
    if (!read->bytes) {
      const auto* const from = reinterpret_cast<const std::byte*>(read->piece.address);
      read->bytes = std::make_shared<std::vector<std::byte>>(from, from + read->piece.bytes);
      return;
    }
    end(read, true);
  }
  void end(Position read, bool ok) {
    Fetched fetched;
    fetched.ok = ok;
    if (read->bytes) fetched.bytes = *read->bytes;
    std::memcpy(&fetched.word, reinterpret_cast<const void*>(read->piece.word_address), sizeof(fetched.word));
    fetched.room = read->bytes;
    const auto done = std::move(read->done);
    under_way.erase(read);
    done(std::move(fetched));
  }
  void carry_out_all() {
    while (!under_way.empty()) step(under_way.begin());
  }

  std::list<Read> under_way;
  std::size_t room = 100;

 private:
  static constexpr std::uint32_t kWords = 2;

  const std::span<const std::byte> pool_;
  std::array<std::uint64_t, kWords> memory_{};
  LeaseWords words_{memory_};
  std::shared_ptr<const Window> window_;
};

}  // namespace flexkv::peer::testing
