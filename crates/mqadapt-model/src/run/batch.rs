//! The rows of one pass: pieces of sequences of any length, packed without padding, each reading its own K/V slots.

use mqadapt_kernels::Span;

/// A piece of a sequence: consecutive rows of the pass, the last tokens of the spans it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Its first row.
    pub row: usize,
    /// Its number of rows.
    pub rows: usize,
    /// Slot of its first row's key and value; the others follow.
    pub slot: usize,
    /// Position of its first row in the sequence: tokens that are cached before it.
    pub position: usize,
    /// Its first span in [`Batch::spans`].
    pub span: usize,
    /// Its number of spans: the tokens before its own, in order.
    pub spans: usize,
}

/// The rows of one pass. Kept and refilled, so that a pass allocates nothing once it has been as large as it gets.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Token of each row; empty where rows come as residual streams.
    pub ids: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Pieces, in the order of their rows.
    pub segments: Vec<Segment>,
    /// What the pieces read before their own rows.
    pub spans: Vec<Span>,
}

impl Batch {
    pub(crate) fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.segments.clear();
        self.spans.clear();
    }

    pub(crate) fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Appends a piece: `ids` continue the tokens cached in `before`, and are cached from `slot` on.
    pub(crate) fn push(&mut self, ids: &[u32], before: impl IntoIterator<Item = Span>, slot: usize) {
        self.push_rows(ids.len(), before, slot);
        self.ids.extend_from_slice(ids);
    }

    /// [`Self::push`] for rows that come as residual streams, not as tokens.
    pub(crate) fn push_rows(&mut self, rows: usize, before: impl IntoIterator<Item = Span>, slot: usize) {
        let (row, span) = (self.rows(), self.spans.len());
        let mut position = 0;
        for part in before.into_iter().filter(|part| part.len > 0) {
            position += part.len;
            let last = self.spans[span..].last_mut();
            match last.filter(|last| last.start + last.len == part.start) {
                Some(last) => last.len += part.len,
                None => self.spans.push(part),
            }
        }
        self.positions.extend((position..position + rows).map(|position| position as u32));
        let spans = self.spans.len() - span;
        self.segments.push(Segment { row, rows, slot, position, span, spans });
    }

    /// What a piece reads before its own rows.
    pub(crate) fn prefix(&self, segment: &Segment) -> &[Span] {
        &self.spans[segment.span..segment.span + segment.spans]
    }

    /// Largest position, plus one.
    pub(crate) fn positions_end(&self) -> usize {
        self.segments.iter().map(|segment| segment.position + segment.rows).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_spans_join_within_a_piece_only() {
        let span = |start, len| Span { start, len };
        let mut batch = Batch::default();
        batch.push(&[7, 8], [span(0, 3), span(3, 1), span(6, 2)], 8);
        batch.push(&[9], [span(8, 2)], 11);
        assert_eq!(batch.spans, [span(0, 4), span(6, 2), span(8, 2)]);
        assert_eq!(batch.positions, [6, 7, 2]);
        assert_eq!(batch.segments[1], Segment { row: 2, rows: 1, slot: 11, position: 2, span: 2, spans: 1 });
        assert_eq!(batch.prefix(&batch.segments[0]), [span(0, 4), span(6, 2)]);
        assert_eq!(batch.positions_end(), 8);
    }
}
