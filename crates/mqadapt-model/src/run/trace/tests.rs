//! How sequences are packed into passes.

use super::{Piece, passes};

#[test]
fn sequences_are_packed_in_order() {
    let piece = |sequence, base, tokens| Piece { sequence, base, tokens };
    assert_eq!(
        passes(&[3, 0, 4, 9, 1, 1], 8),
        [
            vec![piece(0, 0, 0..3), piece(2, 3, 0..4)],
            vec![piece(3, 0, 0..8)],
            vec![piece(3, 0, 8..9)],
            vec![piece(4, 0, 0..1), piece(5, 1, 0..1)],
        ]
    );
}
