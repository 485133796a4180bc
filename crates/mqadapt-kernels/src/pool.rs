//! A small persistent thread pool whose parallel regions cost about a microsecond.
//!
//! A decode step has some 150 regions of 10 to 100 microseconds each. So workers spin for a
//! moment after a region before they park, the caller works too, and nothing is allocated. Each thread has a range of
//! neighbouring tasks of its own, so that it reads memory front to back, which is up to 1.4 times as fast as taking turns;
//! when it is through, it takes tasks from the ends of the others' ranges. So a region finishes even when no worker ever
//! wakes (as after `fork`): the caller then does it all.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    hint,
    marker::PhantomData,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
};

/// Spins before a worker parks: about 100 microseconds, several times the gap between regions of a step.
const SPINS_BEFORE_PARK: u32 = 4000;
/// Spins before the caller, waiting for the last task, offers its core to whoever holds that task up.
const SPINS_BEFORE_YIELD: u32 = 20_000;

/// In `Shared::gate`: region open for workers. Below it the number of workers inside, above it the region's number.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

thread_local! {
    /// Whether this thread is inside a region: regions started there run inline.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// A region's task: called with the task's index and the worker's.
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Worker {
    parked: AtomicBool,
}

/// Unclaimed tasks `first..end`, as `first << 32 | end`, in cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
struct Tasks(AtomicU64);

impl Tasks {
    fn set(&self, first: usize, end: usize) {
        self.0.store((first as u64) << 32 | end as u64, SeqCst);
    }

    /// Takes the first task, as the range's owner does, or the last one.
    fn claim(&self, owner: bool) -> Option<usize> {
        let claimed = self.0.fetch_update(SeqCst, SeqCst, |tasks| {
            let left = tasks >> 32 < tasks & u64::from(u32::MAX);
            left.then(|| if owner { tasks + (1 << 32) } else { tasks - 1 })
        });
        claimed.ok().map(|tasks| if owner { tasks >> 32 } else { (tasks & u64::from(u32::MAX)) - 1 } as usize)
    }
}

struct Shared {
    /// `region << 32 | OPEN | workers inside`.
    gate: AtomicU64,
    /// Of the open region, the caller's first.
    tasks: Box<[Tasks]>,
    /// Written by the region's caller while the gate is closed and nobody is inside, read by workers inside.
    job: UnsafeCell<Option<*const Task<'static>>>,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    workers: Box<[Worker]>,
    stop: AtomicBool,
}

// SAFETY: `job` is the only field that is not `Sync`; the gate orders its writes before every read (see there),
// and the pointed-to closure is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// See the module's documentation.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Held for the duration of a region: one at a time.
    region: Mutex<()>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Pool {
    /// A pool that works with `threads` threads, the caller of a region included.
    pub(crate) fn new(threads: usize) -> Self {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            tasks: (0..=workers).map(|_| Tasks::default()).collect(),
            job: UnsafeCell::new(None),
            panicked: Mutex::new(None),
            workers: (0..workers).map(|_| Worker { parked: AtomicBool::new(false) }).collect(),
            stop: AtomicBool::new(false),
        });
        // Where the system refuses a thread, the pool is smaller; a region needs none of them.
        let threads = (0..workers)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("mqadapt-{}", index + 1)).spawn(move || shared.work(index)).ok()
            })
            .collect();
        Self { shared, region: Mutex::new(()), threads }
    }

    /// Threads that work on a region. Worker indices are below it.
    pub(crate) fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `task(index, worker)` for every `index` below `tasks`, and returns when all are done.
    ///
    /// Tasks that run at the same time have different `worker` indices. From inside a region, runs inline as worker 0.
    ///
    /// # Panics
    /// If a task panics, or there are 2^32 tasks.
    pub(crate) fn run(&self, tasks: usize, task: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.threads.is_empty() || IN_REGION.get() {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let lock = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        self.run_shared(tasks, &task, &lock);
    }

    fn run_shared(&self, tasks: usize, task: &Task<'_>, _region: &MutexGuard<'_, ()>) {
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks of one region");
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker is inside any more when this call returns, and it catches its tasks' panics.
        let erased: *const Task<'static> = unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        // SAFETY: the gate is closed with nobody inside (the last region waited for it), so nobody reads `job`.
        unsafe { *shared.job.get() = Some(erased) };
        let each = tasks.div_ceil(self.threads());
        for (worker, range) in shared.tasks.iter().enumerate() {
            range.set((worker * each).min(tasks), ((worker + 1) * each).min(tasks));
        }
        let region = (shared.gate.load(SeqCst) >> 32).wrapping_add(1);
        shared.gate.store(region << 32 | OPEN, SeqCst);
        for (worker, thread) in shared.workers.iter().zip(&self.threads).take(tasks - 1) {
            if worker.parked.swap(false, SeqCst) {
                thread.thread().unpark();
            }
        }
        shared.enter(0);
        shared.gate.fetch_and(!OPEN, SeqCst);
        let mut spins = 0;
        while shared.gate.load(SeqCst) & INSIDE != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { hint::spin_loop() } else { thread::yield_now() }
        }
        if let Some(payload) = lock_ignoring_poison(&shared.panicked).take() {
            panic::resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A worker catches its tasks' panics, so it ends normally.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Claims and runs tasks until none is left.
    fn claim(&self, task: &Task<'_>, worker: usize) {
        let _inside = Inside::enter();
        for step in 0..self.tasks.len() {
            let range = &self.tasks[(worker + step) % self.tasks.len()];
            while let Some(index) = range.claim(step == 0) {
                task(index, worker);
            }
        }
    }

    /// The life of worker `index`, which is worker `index + 1` of a region.
    fn work(&self, index: usize) {
        let mut done = 0;
        let mut spins = 0;
        while !self.stop.load(SeqCst) {
            let gate = self.gate.load(SeqCst);
            if gate & OPEN != 0 && gate >> 32 != done {
                if self.gate.compare_exchange(gate, gate + 1, SeqCst, SeqCst).is_ok() {
                    done = gate >> 32;
                    spins = 0;
                    self.enter(index + 1);
                    self.gate.fetch_sub(1, SeqCst);
                }
                continue;
            }
            spins += 1;
            if spins < SPINS_BEFORE_PARK {
                hint::spin_loop();
                continue;
            }
            let parked = &self.workers[index].parked;
            parked.store(true, SeqCst);
            // Either this sees the gate that a caller has just opened, or that caller sees `parked`.
            if self.gate.load(SeqCst) & OPEN == 0 && !self.stop.load(SeqCst) {
                thread::park();
            }
            parked.store(false, SeqCst);
            spins = 0;
        }
    }

    /// Works on the open region: as its caller (worker 0), or as a worker that has been counted as inside.
    fn enter(&self, worker: usize) {
        // SAFETY: the caller wrote `job` itself; it waits for workers that are inside, and nobody writes it meanwhile.
        let Some(task) = (unsafe { *self.job.get() }) else { return };
        // SAFETY: as above, the closure outlives our stay.
        let task = unsafe { &*task };
        if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| self.claim(task, worker))) {
            self.tasks.iter().for_each(|range| range.set(0, 0));
            lock_ignoring_poison(&self.panicked).get_or_insert(payload);
        }
    }
}

fn lock_ignoring_poison<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Marks this thread as being inside a region.
struct Inside;

impl Inside {
    fn enter() -> Self {
        IN_REGION.set(true);
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        IN_REGION.set(false);
    }
}

/// A mutable slice whose disjoint parts are written by different tasks of one region.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, handed out in disjoint parts.
unsafe impl<T: Send> Sync for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// The part of `len` elements from `start`.
    ///
    /// # Safety
    /// No other live part overlaps it.
    #[allow(clippy::mut_from_ref)] // disjointness is the caller's contract
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |index, worker| {
                    assert!(worker < pool.threads());
                    counts[index].fetch_add(1, SeqCst);
                });
                assert!(counts.iter().all(|count| count.load(SeqCst) == 1));
            }
        }
    }

    #[test]
    fn many_short_regions_from_many_threads() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        pool.run(4, |_, _| _ = total.fetch_add(1, SeqCst));
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 3 * 2000 * 4);
    }

    #[test]
    fn nested_regions_run_inline() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        pool.run(8, |_, _| pool.run(8, |_, worker| _ = total.fetch_add(1 + worker, SeqCst)));
        assert_eq!(total.into_inner(), 64);
    }

    #[test]
    fn wakes_parked_workers() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            thread::sleep(std::time::Duration::from_millis(5));
            let seen = Mutex::new([false; 2]);
            // Each task waits for the other, so only two threads can finish.
            let arrived = AtomicUsize::new(0);
            pool.run(2, |_, worker| {
                arrived.fetch_add(1, SeqCst);
                while arrived.load(SeqCst) < 2 {
                    thread::yield_now();
                }
                seen.lock().unwrap()[worker] = true;
            });
            assert_eq!(seen.into_inner().unwrap(), [true; 2]);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2);
        for bad in [0, 5] {
            let run = || pool.run(6, |index, _| assert_ne!(index, bad));
            assert!(panic::catch_unwind(AssertUnwindSafe(run)).is_err());
            pool.run(6, |_, _| ());
        }
    }
}
