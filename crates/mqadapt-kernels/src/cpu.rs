//! The handle that all kernels hang off: an instruction set and a pool of threads.

use crate::{Isa, pool::Pool};
use std::{collections::BTreeSet, fmt, fs, num::NonZero, sync::LazyLock, thread};

/// An instruction set and a pool of threads; its methods are the kernels.
///
/// Parallel calls from several threads take turns. A call from inside [`Cpu::parallel`] runs on its own thread.
pub struct Cpu {
    pub(crate) isa: Isa,
    pub(crate) pool: Pool,
}

/// More threads than any machine has use for; each takes memory and a place in the system's tables.
const MOST_THREADS: usize = 4096;

impl Cpu {
    /// A handle on `isa` with `threads` threads, the calling one included (at least 1).
    ///
    /// # Panics
    /// If this processor lacks `isa`.
    #[must_use]
    pub fn new(isa: Isa, threads: usize) -> Self {
        assert!(isa.is_available(), "this processor lacks {isa}");
        Self { isa, pool: Pool::new(threads) }
    }

    /// As the environment asks: `MQADAPT_ISA` (default: the best available) and `MQADAPT_NUM_THREADS`
    /// (default: the physical cores that this process may use).
    ///
    /// # Errors
    /// A message for the user if a variable holds no valid value.
    pub fn from_env() -> Result<Self, String> {
        let threads = match std::env::var("MQADAPT_NUM_THREADS") {
            Ok(text) if !text.is_empty() => parse_threads(&text)?,
            _ => physical_cores(),
        };
        Ok(Self::new(Isa::detect()?, threads))
    }

    /// The process-wide handle, made by [`Cpu::from_env`] at first use.
    ///
    /// # Errors
    /// As [`Cpu::from_env`].
    pub fn try_global() -> Result<&'static Self, String> {
        static GLOBAL: LazyLock<Result<Cpu, String>> = LazyLock::new(Cpu::from_env);
        GLOBAL.as_ref().map_err(Clone::clone)
    }

    /// [`Cpu::try_global`], for those who know that the environment was checked.
    ///
    /// # Panics
    /// If the environment asks for what cannot be had.
    #[must_use]
    pub fn global() -> &'static Self {
        Self::try_global().unwrap_or_else(|message| panic!("{message}"))
    }

    /// The instruction set in use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that share the work, the calling one included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `task(index)` for every index below `tasks`, shared among the threads; returns when all are done.
    ///
    /// # Panics
    /// If a task panics.
    pub fn parallel(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        self.pool.run(tasks, |index, _| task(index));
    }

    /// Splits `rows` rows of `row_len` elements each among tasks of a size worth a thread, and
    /// calls `task(first row, number of rows)`.
    pub(crate) fn by_rows(&self, rows: usize, row_len: usize, task: impl Fn(usize, usize) + Sync) {
        const WORTH_A_TASK: usize = 16 * 1024;
        let step = WORTH_A_TASK.div_ceil(row_len.max(1)).min(rows.max(1));
        self.pool.run(rows.div_ceil(step), |index, _| {
            let first = index * step;
            task(first, step.min(rows - first));
        });
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cpu").field("isa", &self.isa).field("threads", &self.threads()).finish_non_exhaustive()
    }
}

/// A number of threads, as the user gives it.
fn parse_threads(text: &str) -> Result<usize, String> {
    let threads = text.parse().ok().filter(|threads| (1..=MOST_THREADS).contains(threads));
    threads.ok_or_else(|| format!("MQADAPT_NUM_THREADS={text}: expected a whole number from 1 to {MOST_THREADS}"))
}

/// Physical cores among the processors that this process may use, within the limit that a container sets.
fn physical_cores() -> usize {
    let limit = thread::available_parallelism().map_or(1, NonZero::get);
    physical_cores_of_linux().map_or(limit, |cores| cores.clamp(1, limit))
}

/// Sibling threads of one core name the same list; `None` where the system does not say.
fn physical_cores_of_linux() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let cores: Option<BTreeSet<String>> = parse_cpu_list(allowed.trim())?
        .into_iter()
        .map(|cpu| fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok())
        .collect();
    cores.map(|cores| cores.len())
}

/// The numbers of a list such as `0-3,8`.
fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0-2,7"), Some(vec![0, 1, 2, 7]));
        assert_eq!(parse_cpu_list("x"), None);
    }

    #[test]
    fn numbers_of_threads() {
        assert_eq!(parse_threads("3"), Ok(3));
        for wrong in ["0", "-1", "4097", "100000", "99999999999999999999", "two", " 2"] {
            let message = parse_threads(wrong).unwrap_err();
            assert!(message.contains(&format!("={wrong}: expected a whole number from 1 to 4096")), "{message}");
        }
    }

    #[test]
    fn at_least_one_core() {
        assert!(physical_cores() >= 1);
    }
}
