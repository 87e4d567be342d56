// What torch asks a device for: current device and stream, events, pinned memory, resizing of storages.
#pragma once

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.hpp"

namespace laggy {

class Event {
 public:
  void record(TaskPtr marker) {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = std::move(marker);
  }
  // The marker of the last record() so far: who waits, waits for that one, also if another thread records again.
  TaskPtr task() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return task_;
  }

 private:
  mutable std::mutex mutex_;
  TaskPtr task_;  // null if never recorded; guarded by mutex_
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kLaggy; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  // ---- devices
  c10::Device getDevice() const override { return {kLaggy, current_device}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "laggy: there is no device ", device.index());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }

  // ---- streams
  static c10::Stream stream(c10::Device device, int64_t id) {
    const c10::DeviceIndex index = device.has_index() ? device.index() : current_device;
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kLaggy, index), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream(device, current_stream_id[device.has_index() ? device.index() : current_device]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream(device, Scheduler::get().new_stream_id());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const c10::Stream before = getStream(next.device());
    current_stream_id[next.device_index()] = next.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    return Scheduler::get().query_stream(key_of(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    host_waits.emplace_back("stream.synchronize()");
    Scheduler::get().wait_stream(key_of(stream));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    host_waits.emplace_back("synchronize()");
    Scheduler::get().wait_all();
  }

  // ---- events
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    static_cast<Event*>(*event)->record(Scheduler::get().submit(key_of(stream)));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) Scheduler::get().join(key_of(stream), static_cast<Event*>(event)->task());
  }
  bool queryEvent(void* event) const override {
    return !event || Scheduler::get().query(static_cast<Event*>(event)->task());
  }
  void synchronizeEvent(void* event) const override {
    host_waits.emplace_back("event.synchronize()");
    if (event) Scheduler::get().wait(static_cast<Event*>(event)->task());
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    auto finished = [](void* event) { return static_cast<Event*>(event)->task()->finished_seconds; };
    return (finished(end) - finished(start)) * 1e3;
  }

  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    device_memory().recordStream(pointer, stream);
  }
};

// The next memory of a storage that must grow. The old block is freed at once: the copy out of it is queued first.
inline void grow(const c10::Storage& storage, size_t bytes) {
  c10::DeviceGuard on_its_device(storage.device());
  auto next = device_memory().allocate(bytes);
  if (const size_t kept = std::min(bytes, storage.nbytes()); kept)
    Scheduler::get().submit(current_key(current_device), [to = next.get(), from = storage.data(), kept] {
      std::memcpy(to, from, kept);
    });
  storage.set_data_ptr(std::move(next));
  storage.set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { Guard().setDevice({kLaggy, index}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return Guard().exchangeDevice({kLaggy, index}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  at::Device getDeviceFromPtr(void*) const override { return {kLaggy, current_device}; }
  bool isPinnedPtr(const void* address) const override { return pinned_memory().is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { grow(storage, bytes); }
};

}  // namespace laggy
