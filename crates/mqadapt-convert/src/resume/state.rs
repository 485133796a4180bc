//! What an earlier run has completed. In: its journal and its files; out: the shards that need not be written again.

use std::collections::HashMap;
use std::sync::Arc;

use super::journal::Past;
use super::unfinished::{Completed, completed_before};
use crate::folder::directory::Directory;
use crate::layout::{Layout, OutputShard};
use crate::{Result, ShardRecord};

/// What this run takes from an earlier one.
#[derive(Default)]
pub(crate) struct ResumeState {
    /// Shards that are complete and as they were written, by name.
    complete: HashMap<String, ShardRecord>,
    /// What of the earlier run was damaged and is done again, a sentence each.
    pub notes: Vec<String>,
}

impl ResumeState {
    /// Compares what an earlier run has completed with its checksums. `go_on` is told how many bytes of a shard are compared,
    /// after those of the shards that `completed` was told of.
    pub fn verify(
        work: &Arc<Directory>,
        layout: &Layout,
        past: &Past,
        mut go_on: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<Self> {
        let mut state = Self { notes: past.damage().map(str::to_owned).into_iter().collect(), ..Self::default() };
        let mut before = 0;
        for shard in &layout.shards {
            match completed_before(work, shard, past.marks(&shard.name), |hashed| go_on(before, hashed))? {
                Completed::Whole(record) => {
                    before += shard.bytes;
                    state.complete.insert(shard.name.clone(), record);
                }
                Completed::Damaged => {
                    let path = work.path().join(&shard.name);
                    let note = format!("{}: is damaged (its checksum is wrong) and is written again", path.display());
                    state.notes.push(note);
                }
                Completed::No => {}
            }
        }
        Ok(state)
    }

    /// The record of a shard that is complete.
    pub fn complete(&self, shard: &OutputShard) -> Option<&ShardRecord> {
        self.complete.get(&shard.name)
    }

    /// Bytes of complete shards.
    pub fn bytes(&self, layout: &Layout) -> u64 {
        layout.shards.iter().filter(|shard| self.complete(shard).is_some()).map(|shard| shard.bytes).sum()
    }
}
