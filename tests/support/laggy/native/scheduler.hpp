// The order in which queued device work runs: any order that streams and events allow, drawn from a seed.
//
// Contract modelled (that of CUDA, in torch's terms):
//   - tasks of one stream run in the order in which they were submitted;
//   - a stream that waits for an event runs nothing submitted later before the event's task is done;
//   - nothing else orders two tasks, and the host is ordered after a task only if it waits for it.
// A program that is right on every such order is right on a device; one that is wrong on some order is wrong.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace laggy {

using StreamKey = int64_t;  // device index in the upper half, stream id in the lower

enum class Policy : int {
  kEager = 0,   // every task runs when it is submitted: what most runs on a real device look like
  kLazy = 1,    // nothing runs until the host waits for it; then only what that needs, newest first
  kRandom = 2,  // streams overtake each other, by priorities that are drawn anew now and then
};

struct Task {
  std::function<void()> work;                // empty for markers: events, stream joins
  std::vector<std::shared_ptr<Task>> after;  // to be done first; dropped when this task is done
  StreamKey stream = 0;
  bool is_copy = false;  // to the host, and nobody is held up by it but who waits for it
  // Guarded by Scheduler::mutex_:
  bool has_begun = false;
  bool done = false;
  double finished_seconds = 0;
};
using TaskPtr = std::shared_ptr<Task>;

// Calls of this host thread that may stop it on a real device, whether or not they did here.
inline thread_local std::vector<std::string> host_waits;

class Scheduler {
 public:
  // Never destroyed: its thread may still run while the process exits.
  static Scheduler& get() {
    static auto* scheduler = new Scheduler;
    return *scheduler;
  }

  TaskPtr submit(StreamKey stream, std::function<void()> work = nullptr, bool is_copy = false) {
    auto task = std::make_shared<Task>();
    task->work = std::move(work);
    task->stream = stream;
    task->is_copy = is_copy;
    std::unique_lock<std::mutex> lock(mutex_);
    if (auto& last = last_[stream]; last && !last->done) task->after.push_back(last);
    for (auto& joined : joined_[stream])
      if (!joined->done) task->after.push_back(joined);
    joined_[stream].clear();
    last_[stream] = task;
    pending_.push_back(task);
    ++submitted_;
    submitter_ = std::this_thread::get_id();
    if (policy_ == Policy::kEager && !is_held_up_locked(task)) wait_locked(lock, task);
    if (policy_ == Policy::kRandom) run_a_few_locked(lock);
    return task;
  }

  // Everything submitted to `stream` from now on runs after `task`.
  void join(StreamKey stream, const TaskPtr& task) {
    if (!task) return;  // waiting for an event that was never recorded is no wait at all
    std::lock_guard<std::mutex> lock(mutex_);
    if (!task->done) joined_[stream].push_back(task);
  }

  // All copies to the host that have not begun, but so many, stand still, and what comes after, until release(), or
  // until this thread waits.
  void hold(int64_t let_through) {
    std::lock_guard<std::mutex> lock(mutex_);
    is_holding_ = true;
    let_through_ = let_through;
    holder_ = std::this_thread::get_id();
  }
  void release() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_holding_ = false;
      changed_.notify_all();
      if (policy_ != Policy::kEager) return;
    }
    run_all();
  }
  // Whether the next task of a stream would come after a copy that is held.
  bool is_held_up(StreamKey stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& joined = joined_[stream];
    return is_held_up_locked(last_[stream]) ||
           std::any_of(joined.begin(), joined.end(), [&](const TaskPtr& task) { return is_held_up_locked(task); });
  }

  // Blocks the host. Tells of a kernel that failed, as a device does: at the next wait, whoever waits.
  void wait(const TaskPtr& task) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (std::this_thread::get_id() == holder_) is_holding_ = false;
    if (task && !task->done) wait_locked(lock, task);
    TORCH_CHECK(error_.empty(), "laggy: an earlier kernel failed: ", error_);
  }
  void wait_stream(StreamKey stream) { wait(submit(stream)); }
  void wait_all() {
    run_all();
    wait(nullptr);
  }

  // Never blocks. Polling makes progress, but the first look at unfinished work never finds it done.
  bool query(const TaskPtr& task) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!task || task->done) return true;
    wanted_.push_back(task);
    changed_.notify_all();
    return false;
  }
  bool query_stream(StreamKey stream) {
    TaskPtr marker;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      marker = last_[stream];
      auto& joined = joined_[stream];
      auto waiting = std::find_if(joined.begin(), joined.end(), [](const TaskPtr& t) { return !t->done; });
      if (waiting != joined.end()) marker = *waiting;
    }
    return query(marker);
  }

  bool all_done(const std::vector<TaskPtr>& tasks) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::all_of(tasks.begin(), tasks.end(), [](const TaskPtr& t) { return t->done; });
  }

  // Drains what is queued under the old policy first. Returns the error of a kernel that failed since, if any.
  std::string reset(Policy policy, uint64_t seed) {
    release();
    run_all();
    std::lock_guard<std::mutex> lock(mutex_);
    policy_ = policy;
    random_.seed(seed);
    priority_.clear();
    submissions_per_nudge_ = uint64_t{2} << (random_() % 4);
    return std::exchange(error_, {});
  }

  int64_t new_stream_id() {
    std::lock_guard<std::mutex> lock(mutex_);
    return ++last_stream_id_;  // 0 is the default stream
  }

  struct Counters {
    int64_t submitted, ran, pending;
  };
  Counters counters() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {submitted_, ran_, static_cast<int64_t>(pending_.size())};
  }

 private:
  Scheduler() {
    std::thread([this] { run_forever(); }).detach();
  }

  void run_all() {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::vector<TaskPtr> all = pending_;
    for (auto task = all.rbegin(); task != all.rend(); ++task)
      if (!(*task)->done) wait_locked(lock, *task);
  }

  void wait_locked(std::unique_lock<std::mutex>& lock, const TaskPtr& task) {
    const auto this_thread = waiting_.insert(std::this_thread::get_id());
    wanted_.push_back(task);
    changed_.notify_all();
    changed_.wait(lock, [&] { return task->done; });
    waiting_.erase(this_thread);
  }

  // Some submissions let up to four tasks run, so that host and device advance together: closely under some seeds;
  // under others the device falls behind until somebody waits for it.
  void run_a_few_locked(std::unique_lock<std::mutex>& lock) {
    if (is_patient_ || random_() % submissions_per_nudge_) return;
    if (legal().empty()) return;
    nudges_ = static_cast<int64_t>(1 + random_() % 4);
    changed_.notify_all();
    changed_.wait(lock, [&] { return nudges_ <= 0 || pending_.empty(); });
    nudges_ = 0;
    changed_.notify_all();  // another host thread may wait for its own nudges, which these were
  }

  void run_forever() {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (!something_to_do()) {
        nudges_ = 0;  // all that is left is held
        changed_.notify_all();
        changed_.wait(lock, [&] { return something_to_do(); });
        if (policy_ == Policy::kRandom && !wanted_.empty()) be_patient(lock);
        continue;
      }
      TaskPtr task = pick();
      task->has_begun = true;
      if (task->is_copy) --let_through_;
      if (!somebody_wants()) --nudges_;
      lock.unlock();
      std::string error = run(*task);
      lock.lock();
      finish(task, error);
    }
  }

  bool something_to_do() {
    wanted_.erase(std::remove_if(wanted_.begin(), wanted_.end(), [](const TaskPtr& t) { return t->done; }),
                  wanted_.end());
    if (!somebody_wants() && nudges_ <= 0) return false;
    return is_holding_ ? !legal().empty() : !wanted_.empty() || !pending_.empty();
  }

  bool somebody_wants() const {
    return std::any_of(wanted_.begin(), wanted_.end(), [&](const TaskPtr& task) { return !is_held_up_locked(task); });
  }

  // A thread that waits wakes the executor; while a device works for it, another thread goes on submitting. Without
  // this, a stream that a writer thread waits for is never late, and a missing wait before writing hardly ever shows.
  // Patience ends when the thread that submits comes to wait itself, or at a limit, for it may wait elsewhere.
  void be_patient(std::unique_lock<std::mutex>& lock) {
    constexpr int kLimitsMs[] = {0, 1, 5, 20};
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(kLimitsMs[random_() % 4]);
    is_patient_ = true;
    changed_.wait_until(lock, until, [&] { return waiting_.count(submitter_) > 0; });
    is_patient_ = false;
  }

  TaskPtr pick() {
    const std::vector<TaskPtr> candidates = legal();
    return policy_ == Policy::kRandom ? by_priority(candidates) : candidates.back();
  }

  std::vector<TaskPtr> legal() {
    std::set<const Task*> needed;
    if (policy_ != Policy::kRandom)
      for (auto& task : wanted_) add_ancestors(task, needed);
    std::vector<TaskPtr> found;
    for (auto& task : pending_)
      if (is_legal(*task) && (needed.empty() || needed.count(task.get()))) found.push_back(task);
    return found;
  }

  // One priority per stream, not one per task: only a stream that stays behind for many tasks shows a race in
  // which one side must be late and the other early.
  TaskPtr by_priority(const std::vector<TaskPtr>& legal) {
    for (auto& task : legal)
      if (!priority_.count(task->stream)) priority_[task->stream] = random_();
    auto lower = [&](const TaskPtr& a, const TaskPtr& b) { return priority_[a->stream] < priority_[b->stream]; };
    TaskPtr task = *std::max_element(legal.begin(), legal.end(), lower);
    if (random_() % 16 == 0) priority_[task->stream] = random_();
    return task;
  }

  bool is_held_up_locked(const TaskPtr& task) const {
    if (!is_holding_ || !task) return false;
    std::set<const Task*> before;
    add_ancestors(task, before);
    auto stands_still = [](const Task* each) { return each->is_copy && !each->has_begun; };
    return std::count_if(before.begin(), before.end(), stands_still) > let_through_;
  }

  bool is_legal(const Task& task) const {
    return !(is_holding_ && task.is_copy && let_through_ <= 0) &&
           std::all_of(task.after.begin(), task.after.end(), [](const TaskPtr& t) { return t->done; });
  }

  static void add_ancestors(const TaskPtr& task, std::set<const Task*>& found) {
    if (task->done || !found.insert(task.get()).second) return;
    for (auto& earlier : task->after) add_ancestors(earlier, found);
  }

  static std::string run(Task& task) {
    std::string error;
    try {
      if (task.work) task.work();
    } catch (const std::exception& failure) {
      error = failure.what();
    }
    task.work = nullptr;
    return error;
  }

  void finish(const TaskPtr& task, const std::string& error) {
    if (error_.empty()) error_ = error;
    task->done = true;
    task->finished_seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    task->after.clear();
    pending_.erase(std::find(pending_.begin(), pending_.end(), task));
    ++ran_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  // All below: guarded by mutex_.
  std::vector<TaskPtr> pending_;  // submitted and not done, oldest first
  std::vector<TaskPtr> wanted_;   // somebody waits for these, or polled them
  std::multiset<std::thread::id> waiting_;  // host threads in wait()
  std::thread::id submitter_;               // the host thread that submitted last
  std::map<StreamKey, TaskPtr> last_;
  std::map<StreamKey, std::vector<TaskPtr>> joined_;  // what the stream's next task must wait for
  std::map<StreamKey, uint64_t> priority_;
  std::mt19937_64 random_{0};
  Policy policy_ = Policy::kLazy;
  int64_t nudges_ = 0;  // tasks to run although nobody waits
  uint64_t submissions_per_nudge_ = 2;
  bool is_holding_ = false;
  int64_t let_through_ = 0;  // copies that run although the others are held
  std::thread::id holder_;
  bool is_patient_ = false;  // the executor lets other host threads submit more
  int64_t last_stream_id_ = 0;
  int64_t submitted_ = 0, ran_ = 0;
  std::string error_;  // of the first kernel that failed since the last reset()
};

}  // namespace laggy
