//! The first head of the group (the GQA paper's ablation, arXiv 2305.13245, section 3.3).

use crate::heads::row_merge::{MergeOptions, RowMerge, RowsAt};

pub(crate) struct First;

impl RowMerge for First {
    fn merge(&self, _options: &MergeOptions, _at: RowsAt, heads: &[&[f32]], out: &mut [f32]) {
        if let Some(first) = heads.first() {
            out.copy_from_slice(first);
        }
    }
}
