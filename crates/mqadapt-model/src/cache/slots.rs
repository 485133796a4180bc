//! Which token slots of the K/V cache are in use. A sequence is a list of spans of slots; sequences share spans.

use mqadapt_kernels::Span;

/// Free slots of a cache of fixed capacity, as disjoint, ascending, non-adjacent runs.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    free: Vec<Span>,
}

impl Slots {
    /// Everything free.
    pub(crate) fn reset(&mut self, capacity: usize) {
        self.free.clear();
        self.free.push(Span { start: 0, len: capacity });
    }

    #[cfg(test)]
    pub(crate) fn available(&self) -> usize {
        self.free.iter().map(|run| run.len).sum()
    }

    /// Takes up to `want` slots in one run: the first run that is long enough, otherwise the longest.
    /// `None` where no slot is free.
    pub(crate) fn take(&mut self, want: usize) -> Option<Span> {
        let enough = self.free.iter().position(|run| run.len >= want);
        let longest = || (0..self.free.len()).max_by_key(|&i| (self.free[i].len, std::cmp::Reverse(i)));
        let chosen = enough.or_else(longest)?;
        let run = &mut self.free[chosen];
        let taken = Span { start: run.start, len: want.min(run.len) };
        run.start += taken.len;
        run.len -= taken.len;
        if run.len == 0 {
            self.free.remove(chosen);
        }
        (taken.len > 0).then_some(taken)
    }

    /// Gives slots back.
    pub(crate) fn give(&mut self, span: Span) {
        if span.len == 0 {
            return;
        }
        let end = |run: &Span| run.start + run.len;
        let at = self.free.partition_point(|run| run.start < span.start);
        debug_assert!(at == 0 || end(&self.free[at - 1]) <= span.start, "{span:?} given back twice");
        let joins_before = at > 0 && end(&self.free[at - 1]) == span.start;
        let joins_after = self.free.get(at).is_some_and(|next| next.start == end(&span));
        match (joins_before, joins_after) {
            (true, true) => {
                self.free[at - 1].len += span.len + self.free[at].len;
                self.free.remove(at);
            }
            (true, false) => self.free[at - 1].len += span.len,
            (false, true) => self.free[at] = Span { start: span.start, len: span.len + self.free[at].len },
            (false, false) => self.free.insert(at, span),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_joins() {
        let span = |start, len| Span { start, len };
        let mut slots = Slots::default();
        slots.reset(10);
        let (a, b, c) = (slots.take(3).unwrap(), slots.take(4).unwrap(), slots.take(9).unwrap());
        assert_eq!((a, b, c), (span(0, 3), span(3, 4), span(7, 3)));
        assert_eq!(slots.take(1), None);
        slots.give(a);
        slots.give(c);
        assert_eq!(slots.free, [span(0, 3), span(7, 3)]);
        // no run of five: the longest, the first of equals
        assert_eq!(slots.take(5), Some(span(0, 3)));
        slots.give(span(0, 3));
        slots.give(b);
        assert_eq!(slots.free, [span(0, 10)]);
        assert_eq!(slots.available(), 10);
    }
}
