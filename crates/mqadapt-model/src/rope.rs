//! Tables of the rotary embedding, computed in f64, kept in f32.

/// Positions are added by this many at least.
const STEP: usize = 512;

/// Cosines and sines of every position so far, `[positions, pairs]`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    /// Rotated pairs of a head; 0: no rotary embedding.
    pub pairs: usize,
    /// Radians per token of each pair.
    inv_freq: Vec<f64>,
    /// Factor on cosines and sines.
    factor: f64,
}

impl RopeTable {
    pub(crate) fn new(inv_freq: Vec<f64>, factor: f64) -> Self {
        Self { cos: Vec::new(), sin: Vec::new(), pairs: inv_freq.len(), inv_freq, factor }
    }

    /// Makes sure of the positions below `end`.
    pub(crate) fn reach(&mut self, end: usize) {
        let Some(have) = self.cos.len().checked_div(self.pairs) else { return };
        if end <= have {
            return;
        }
        for position in have..end.next_multiple_of(STEP) {
            for inv_freq in &self.inv_freq {
                let (sin, cos) = (position as f64 * inv_freq).sin_cos();
                self.cos.push((cos * self.factor) as f32);
                self.sin.push((sin * self.factor) as f32);
            }
        }
    }
}

/// The tables of a model: one for the layers that rotate by the same frequencies.
#[derive(Debug)]
pub(crate) struct RopeTables {
    tables: Vec<RopeTable>,
    /// The table of each layer.
    of_layer: Vec<usize>,
}

impl RopeTables {
    /// The tables of layers with these frequencies and factors.
    pub(crate) fn new(layers: impl Iterator<Item = (Vec<f64>, f64)>) -> Self {
        let mut tables: Vec<RopeTable> = Vec::new();
        let of_layer = layers
            .map(|(inv_freq, factor)| {
                let same = |table: &RopeTable| table.inv_freq == inv_freq && table.factor == factor;
                tables.iter().position(same).unwrap_or_else(|| {
                    tables.push(RopeTable::new(inv_freq, factor));
                    tables.len() - 1
                })
            })
            .collect();
        Self { tables, of_layer }
    }

    /// Makes sure of the positions below `end`.
    pub(crate) fn reach(&mut self, end: usize) {
        self.tables.iter_mut().for_each(|table| table.reach(end));
    }

    /// The table of a layer of the decoder.
    pub(crate) fn of_layer(&self, layer_idx: usize) -> &RopeTable {
        &self.tables[self.of_layer[layer_idx]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_keeps() {
        let mut table = RopeTable::new(vec![1.0, 0.1], 1.0);
        table.reach(1);
        let first = table.cos.clone();
        table.reach(STEP + 1);
        assert_eq!((table.cos.len(), &table.cos[..first.len()]), (2 * 2 * STEP, &first[..]));
        // pair 1 of position 3: 3 * 100^(-1/2)
        assert_eq!(table.sin[3 * 2 + 1], 0.3f64.sin() as f32);
    }

    #[test]
    fn layers_share_the_table_of_their_frequencies() {
        let layers = [vec![1.0, 0.1], vec![1.0, 0.01], vec![], vec![1.0, 0.1], vec![1.0, 0.1]];
        let factors = [1.0, 1.0, 1.0, 1.0, 1.5];
        let mut tables = RopeTables::new(layers.iter().cloned().zip(factors));
        tables.reach(2);
        assert_eq!((tables.tables.len(), &tables.of_layer), (4, &vec![0, 1, 2, 0, 3]));
        for (layer_idx, inv_freq) in layers.iter().enumerate() {
            let table = tables.of_layer(layer_idx);
            assert_eq!((&table.inv_freq, table.pairs), (inv_freq, inv_freq.len()));
        }
        assert_eq!(tables.of_layer(4).cos[0], 1.5);
        assert!(tables.of_layer(2).cos.is_empty());
    }
}
