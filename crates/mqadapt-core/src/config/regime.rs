//! Which rotary frequencies a text gets. In: its number of tokens; out: what [`Rope::inv_freq_of`](crate::Rope::inv_freq_of) and
//! whoever caches rotated keys tell texts apart by.

/// The rotary frequencies of a text. `dynamic` and `longrope` take others where it is longer than the original context:
/// `longrope` one more set, `dynamic` a set for every length. Keys that are rotated in different regimes do not go together.
///
/// Held as the shortest text that is rotated so; 0 for the frequencies of the original context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RopeRegime(pub(super) usize);

impl RopeRegime {
    /// Tokens of the shortest text of this regime; 0: of any text up to the original context.
    #[must_use]
    pub fn tokens(self) -> usize {
        self.0
    }

    /// Whether its texts are longer than a context.
    pub(super) fn is_beyond(self, context: usize) -> bool {
        self.0 > context
    }
}
