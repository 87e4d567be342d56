// Device and pinned memory. Both are host memory; what is modelled is when a block may be used again.
//
//   - A freed device block goes back to its allocation stream at once, and is poisoned *on that stream*: the soonest
//     legal reuse. Another stream that still reads it then reads poison, unless record_stream() named that stream.
//   - Fresh memory is poison: what was never written is seen.
//   - A pinned block is handed out again only when the copies that used it are done (torch's own rule).
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Stream.h>

#include <cstdlib>
#include <cstring>

#include "scheduler.hpp"

namespace laggy {

constexpr auto kLaggy = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;

inline thread_local c10::DeviceIndex current_device = 0;
inline thread_local int64_t current_stream_id[kDevices] = {};

inline StreamKey key_of(c10::DeviceIndex device, int64_t id) { return (StreamKey{device} << 32) | id; }
inline StreamKey key_of(const c10::Stream& stream) { return key_of(stream.device_index(), stream.id()); }
inline StreamKey current_key(c10::DeviceIndex device) { return key_of(device, current_stream_id[device]); }

// All bits set is NaN in every floating type and -1 in every signed one.
inline void poison(void* address, size_t bytes) { std::memset(address, 0xff, bytes); }

struct Block {
  void* address;
  size_t bytes;
  StreamKey stream;               // the current one when it was first allocated; its free list is that stream's
  std::set<StreamKey> used_also;  // streams named by record_stream()
};

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device device(kLaggy, current_device);
    if (!bytes) return {nullptr, nullptr, &free_block, device};
    const size_t rounded = (bytes + 511) / 512 * 512;
    const StreamKey stream = current_key(current_device);
    std::lock_guard<std::mutex> lock(mutex_);
    ++allocations_;
    take_back_finished();
    Block* block = nullptr;
    if (auto found = free_.find({rounded, stream}); found != free_.end()) {
      block = found->second;
      free_.erase(found);
      ++reuses_;
    } else {
      block = new Block{nullptr, rounded, stream, {}};
      TORCH_CHECK(!posix_memalign(&block->address, 512, rounded), "laggy: out of memory");
      poison(block->address, rounded);
    }
    return {block->address, block, &free_block, device};
  }

  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    auto* block = static_cast<Block*>(pointer.get_context());
    std::lock_guard<std::mutex> lock(mutex_);
    if (block && key_of(stream) != block->stream) block->used_also.insert(key_of(stream));
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    host_waits.emplace_back("copy of a storage");
    Scheduler::get().wait_all();
    std::memcpy(to, from, bytes);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}

  int64_t allocations() const { return allocations_; }
  int64_t frees() const { return frees_; }
  int64_t reuses() const { return reuses_; }

 private:
  static void free_block(void* block);

  void release(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++frees_;
    std::vector<TaskPtr> uses;
    for (StreamKey stream : block->used_also) uses.push_back(Scheduler::get().submit(stream));
    if (uses.empty()) {
      make_free(block);
    } else {
      in_use_elsewhere_.emplace_back(block, std::move(uses));
    }
  }

  void take_back_finished() {
    for (auto it = in_use_elsewhere_.begin(); it != in_use_elsewhere_.end();) {
      if (!Scheduler::get().all_done(it->second)) {
        ++it;
        continue;
      }
      it->first->used_also.clear();
      make_free(it->first);
      it = in_use_elsewhere_.erase(it);
    }
  }

  void make_free(Block* block) {
    Scheduler::get().submit(block->stream, [a = block->address, n = block->bytes] { poison(a, n); });
    free_.insert({{block->bytes, block->stream}, block});
  }

  std::mutex mutex_;  // taken before the scheduler's, never after
  std::multimap<std::pair<size_t, StreamKey>, Block*> free_;
  std::vector<std::pair<Block*, std::vector<TaskPtr>>> in_use_elsewhere_;  // freed, waiting for record_stream()
  int64_t allocations_ = 0, frees_ = 0, reuses_ = 0;
};

struct PinnedBlock {
  char* address;
  size_t bytes;
  std::vector<TaskPtr> uses;  // copies that read or write it
};

class PinnedMemory final : public at::HostAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t rounded = std::max<size_t>(64, bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    auto reusable = [&](PinnedBlock* b) { return b->bytes == rounded && Scheduler::get().all_done(b->uses); };
    PinnedBlock* block = nullptr;
    if (auto found = std::find_if(free_.begin(), free_.end(), reusable); found != free_.end()) {
      block = *found;
      free_.erase(found);
    } else {
      void* address = nullptr;
      TORCH_CHECK(!posix_memalign(&address, 4096, rounded), "laggy: out of pinned memory");
      block = new PinnedBlock{static_cast<char*>(address), rounded, {}};
    }
    block->uses.clear();
    poison(block->address, rounded);
    live_[block->address] = block;
    return {block->address, block, &free_block, c10::Device(c10::kCPU)};
  }

  bool is_pinned(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    return find(address) != nullptr;
  }

  void used_by(const void* address, const TaskPtr& task) {
    std::lock_guard<std::mutex> lock(mutex_);
    PinnedBlock* block = find(address);
    if (!block) return;
    // A slot lives as long as the run: without this, its list of copies would grow with every snapshot.
    if (block->uses.size() >= 64 && Scheduler::get().all_done(block->uses)) block->uses.clear();
    block->uses.push_back(task);
  }

  bool record_event(void* address, void*, c10::Stream stream) override {
    if (!is_pinned(address)) return false;
    used_by(address, Scheduler::get().submit(key_of(stream)));
    return true;
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}

 private:
  static void free_block(void* block);

  PinnedBlock* find(const void* address) {
    auto* byte = static_cast<char*>(const_cast<void*>(address));
    auto after = live_.upper_bound(byte);
    if (after == live_.begin()) return nullptr;
    PinnedBlock* block = std::prev(after)->second;
    return byte < block->address + block->bytes ? block : nullptr;
  }

  void release(PinnedBlock* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    live_.erase(block->address);
    free_.push_back(block);
  }

  std::mutex mutex_;  // taken before the scheduler's, never after
  std::map<char*, PinnedBlock*> live_;
  std::vector<PinnedBlock*> free_;
};

// Never destroyed: tensors may outlive static destructors.
inline DeviceMemory& device_memory() {
  static auto* memory = new DeviceMemory;
  return *memory;
}
inline PinnedMemory& pinned_memory() {
  static auto* memory = new PinnedMemory;
  return *memory;
}
inline void DeviceMemory::free_block(void* block) {
  if (block) device_memory().release(static_cast<Block*>(block));
}
inline void PinnedMemory::free_block(void* block) {
  if (block) pinned_memory().release(static_cast<PinnedBlock*>(block));
}

}  // namespace laggy
