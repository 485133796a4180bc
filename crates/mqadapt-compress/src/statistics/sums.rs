//! What the closed form needs to know about one layer's activations: sums over
//! tokens, in f64, that add. Data in: sums from [`crate::Accumulator`] or named
//! tensors from a file. Data out: the same, and per-token moments.

use std::collections::BTreeMap;

use faer::{Mat, c64};

use crate::Error;
use mqadapt_core::AttentionShape;

use crate::layer::validate;

/// The moments kept per query head. `p` are the attention probabilities of the
/// original model, `k_n`, `v_n` the stacked heads of a block (`N = block_heads * head_dim`). Symmetric ones are kept as
/// the rows of their lower triangle, `[n (n + 1) / 2]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// `sum_m q_m q_mT` as queries enter the rotary embedding, `[head_dim, head_dim]`.
    Query,
    /// `sum_m (sum_n p_mn k_n k_nT - mu_m mu_mT)`, `mu_m = sum_n p_mn k_n`, keys
    /// before the rotary embedding, `[N, N]`.
    KeyCentred,
    /// The same of the rotated keys as complex numbers, per pair:
    /// `[rotary_pairs, block_heads, block_heads, 2]`, re and im of `E[z zH]`.
    KeyRotated,
    /// `sum_m s_m s_mT`, `s_m = sum_n p_mn v_n`, `[N, N]`.
    ValueOutput,
    /// `sum_m sum_n p_mn v_n v_nT` of the head's own values, `[head_dim, head_dim]`.
    ValueSecond,
}

impl Moment {
    /// Every moment, in storage order.
    pub const ALL: [Self; 5] = [Self::Query, Self::KeyCentred, Self::KeyRotated, Self::ValueOutput, Self::ValueSecond];

    /// Name of its tensor in [`LayerStatistics::to_tensors`].
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::KeyCentred => "key_centred",
            Self::KeyRotated => "key_rotated",
            Self::ValueOutput => "value_output",
            Self::ValueSecond => "value_second",
        }
    }
}

/// The counts that give the moments their shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatisticsShape {
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads of the source layer.
    pub num_key_value_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Rotated pairs per head.
    pub rotary_pairs: usize,
    /// K/V heads whose joint moments are kept: contiguous blocks of this many.
    /// `num_key_value_heads` serves every target and regrouping; a smaller block
    /// serves the targets of at least `num_key_value_heads / block_heads` heads.
    pub block_heads: usize,
    /// The moments that are kept, in the order of [`Moment::ALL`].
    pub moments: &'static [Moment],
}

impl StatisticsShape {
    /// The shape for a layer; `block_heads` none keeps all heads in one block.
    ///
    /// # Errors
    /// [`Error::Geometry`] where the geometry or the block does not fit.
    pub fn new(geometry: &AttentionShape, block_heads: Option<usize>) -> Result<Self, Error> {
        validate(geometry)?;
        let kv = geometry.num_key_value_heads;
        let block_heads = block_heads.unwrap_or(kv);
        if block_heads == 0 || !kv.is_multiple_of(block_heads) {
            return Err(Error::Geometry(format!("block_heads {block_heads} does not divide num_key_value_heads {kv}")));
        }
        Ok(Self {
            num_attention_heads: geometry.num_attention_heads,
            num_key_value_heads: kv,
            head_dim: geometry.head_dim,
            rotary_pairs: geometry.rotary_pairs(),
            block_heads,
            moments: &Moment::ALL,
        })
    }

    /// The same for some of the moments.
    #[must_use]
    pub fn with_moments(self, moments: &'static [Moment]) -> Self {
        Self { moments, ..self }
    }

    /// Stacked dims of a block.
    #[must_use]
    pub fn width(&self) -> usize {
        self.block_heads * self.head_dim
    }

    /// Shape of a moment of one query head, as it is kept.
    #[must_use]
    pub fn of(&self, moment: Moment) -> Vec<usize> {
        match moment {
            Moment::Query | Moment::ValueSecond => vec![triangle(self.head_dim, 0)],
            Moment::KeyCentred | Moment::ValueOutput => vec![triangle(self.width(), 0)],
            Moment::KeyRotated => vec![self.rotary_pairs, self.block_heads, self.block_heads, 2],
        }
    }

    fn len(&self, moment: Moment) -> usize {
        self.of(moment).iter().product()
    }

    /// Names and shapes of the tensors of [`LayerStatistics::to_tensors`].
    #[must_use]
    pub fn tensors(&self) -> BTreeMap<&'static str, Vec<usize>> {
        let mut tensors = BTreeMap::from([("contribution", vec![self.num_key_value_heads]), ("tokens", vec![1])]);
        for &moment in self.moments {
            let mut shape = vec![self.num_attention_heads];
            shape.extend(self.of(moment));
            tensors.insert(moment.name(), shape);
        }
        tensors
    }

    /// Bytes of one layer's statistics.
    #[must_use]
    pub fn bytes(&self) -> usize {
        8 * self.num_attention_heads * self.moments.iter().map(|m| self.len(*m)).sum::<usize>()
    }
}

/// The sums of one query head, one vector per [`Moment`], row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadMoments {
    sums: [Vec<f64>; Moment::ALL.len()],
}

impl HeadMoments {
    fn zeros(shape: &StatisticsShape) -> Self {
        Self { sums: Moment::ALL.map(|m| vec![0.0; if shape.moments.contains(&m) { shape.len(m) } else { 0 }]) }
    }

    pub(crate) fn get_mut(&mut self, moment: Moment) -> &mut [f64] {
        &mut self.sums[moment as usize]
    }
}

/// Place of row `i`, column `j <= i` in the rows of a lower triangle, one after the other.
pub(crate) fn triangle(i: usize, j: usize) -> usize {
    i * (i + 1) / 2 + j
}

/// Tensors by name: shape and row-major values.
pub type NamedTensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// Sums of one layer over calibration tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerStatistics {
    pub(crate) shape: StatisticsShape,
    pub(crate) tokens: u64,
    pub(crate) heads: Vec<HeadMoments>,
    pub(crate) contribution: Vec<f64>,
}

impl LayerStatistics {
    /// Statistics of no text.
    #[must_use]
    pub fn zeros(shape: StatisticsShape) -> Self {
        Self {
            shape,
            tokens: 0,
            heads: (0..shape.num_attention_heads).map(|_| HeadMoments::zeros(&shape)).collect(),
            contribution: vec![0.0; shape.num_key_value_heads],
        }
    }

    /// The counts behind the shapes.
    #[must_use]
    pub fn shape(&self) -> &StatisticsShape {
        &self.shape
    }

    /// Tokens summed over.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds the sums of other text.
    ///
    /// # Errors
    /// [`Error::StatisticsMismatch`] where they are of a layer of another shape.
    pub fn add(&mut self, other: &Self) -> Result<(), Error> {
        if self.shape != other.shape {
            return Err(Error::StatisticsMismatch(format!("{:?} against {:?}", self.shape, other.shape)));
        }
        self.tokens += other.tokens;
        let add = |a: &mut Vec<f64>, b: &Vec<f64>| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        for (mine, theirs) in self.heads.iter_mut().zip(&other.heads) {
            mine.sums.iter_mut().zip(&theirs.sums).for_each(|(a, b)| add(a, b));
        }
        add(&mut self.contribution, &other.contribution);
        Ok(())
    }

    /// Every sum as a named tensor, query heads stacked first; `tokens` is `[1]`.
    #[must_use]
    pub fn to_tensors(&self) -> NamedTensors {
        let values = |name: &str| match Moment::ALL.into_iter().find(|moment| moment.name() == name) {
            Some(moment) => self.heads.iter().flat_map(|h| h.sums[moment as usize].iter().copied()).collect(),
            None if name == "contribution" => self.contribution.clone(),
            None => vec![self.tokens as f64],
        };
        self.shape.tensors().into_iter().map(|(name, shape)| (name.to_owned(), (shape, values(name)))).collect()
    }

    /// The inverse of [`Self::to_tensors`]; names it does not know are left alone.
    ///
    /// # Errors
    /// [`Error::StatisticsMismatch`] names a tensor that is missing, of another
    /// shape or not finite.
    pub fn from_tensors(shape: StatisticsShape, tensors: &NamedTensors) -> Result<Self, Error> {
        let take = |name: &str, expected: &[usize]| -> Result<&[f64], Error> {
            let (found, values) =
                tensors.get(name).ok_or_else(|| Error::StatisticsMismatch(format!("tensor `{name}` is missing")))?;
            if found != expected || values.len() != expected.iter().product::<usize>() {
                return Err(Error::StatisticsMismatch(format!(
                    "tensor `{name}` has shape {found:?}, expected {expected:?}"
                )));
            }
            if values.iter().any(|v| !v.is_finite()) {
                return Err(Error::StatisticsMismatch(format!("tensor `{name}` holds values that are not finite")));
            }
            Ok(values)
        };
        let mut statistics = Self::zeros(shape);
        for &moment in shape.moments {
            let mut expected = vec![shape.num_attention_heads];
            expected.extend(shape.of(moment));
            let values = take(moment.name(), &expected)?;
            let len = shape.len(moment);
            if len > 0 {
                for (head, values) in statistics.heads.iter_mut().zip(values.chunks_exact(len)) {
                    head.sums[moment as usize].copy_from_slice(values);
                }
            }
        }
        statistics.contribution.copy_from_slice(take("contribution", &[shape.num_key_value_heads])?);
        let tokens = take("tokens", &[1])?[0];
        if !(0.0..9e15).contains(&tokens) || tokens.fract() != 0.0 {
            return Err(Error::StatisticsMismatch(format!("tensor `tokens` is {tokens}, not a count")));
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // checked above
        let tokens = tokens as u64;
        statistics.tokens = tokens;
        Ok(statistics)
    }

    /// Checks that the statistics are of a layer of this shape, hold some moments, and cover the merge of `members` K/V
    /// heads at a time.
    pub(crate) fn check(&self, geometry: &AttentionShape, members: usize, moments: &[Moment]) -> Result<(), Error> {
        if let Some(missing) = moments.iter().find(|moment| !self.shape.moments.contains(moment)) {
            return Err(Error::StatisticsMismatch(format!("they hold no moment `{}`", missing.name())));
        }
        let expected = StatisticsShape::new(geometry, Some(self.shape.block_heads))?.with_moments(self.shape.moments);
        if expected != self.shape {
            return Err(Error::StatisticsMismatch(format!("{:?}, the layer needs {expected:?}", self.shape)));
        }
        if !self.shape.block_heads.is_multiple_of(members) {
            return Err(Error::StatisticsMismatch(format!(
                "they hold blocks of {} K/V heads, the plan merges {members} at a time",
                self.shape.block_heads
            )));
        }
        if self.tokens == 0 {
            return Err(Error::StatisticsMismatch("they are of no tokens".into()));
        }
        Ok(())
    }

    fn per_token(&self) -> f64 {
        let tokens = self.tokens as f64;
        1.0 / tokens
    }

    /// A `[head_dim, head_dim]` moment of a query head, per token.
    pub(crate) fn own(&self, moment: Moment, head: usize) -> Mat<f64> {
        let all: Vec<usize> = (0..self.shape.head_dim).collect();
        self.gathered(moment, head, &all)
    }

    /// An `[N, N]` moment of a query head, per token, restricted to some dims of the K/V heads `members` (of one
    /// block) stacked in that order.
    pub(crate) fn stacked(&self, moment: Moment, head: usize, members: &[usize], dims: &[usize]) -> Mat<f64> {
        let (d, block) = (self.shape.head_dim, self.shape.block_heads);
        let at: Vec<usize> = members.iter().flat_map(|g| dims.iter().map(move |i| (g % block) * d + i)).collect();
        self.gathered(moment, head, &at)
    }

    /// Rows and columns `at` of a symmetric moment, per token.
    fn gathered(&self, moment: Moment, head: usize, at: &[usize]) -> Mat<f64> {
        let scale = self.per_token();
        let sums = &self.heads[head].sums[moment as usize];
        Mat::from_fn(at.len(), at.len(), |i, j| sums[triangle(at[i].max(at[j]), at[i].min(at[j]))] * scale)
    }

    /// `E[z zH]` of the rotated keys of `members` at pair `pair`.
    pub(crate) fn rotated_pair(&self, head: usize, pair: usize, members: &[usize]) -> Mat<c64> {
        let (b, scale) = (self.shape.block_heads, self.per_token());
        let sums = &self.heads[head].sums[Moment::KeyRotated as usize];
        Mat::from_fn(members.len(), members.len(), |i, j| {
            let at = 2 * ((pair * b + members[i] % b) * b + members[j] % b);
            c64::new(sums[at] * scale, sums[at + 1] * scale)
        })
    }

    /// Mean over tokens of the L2 norm of what K/V head `head`'s query heads
    /// together add to the output of `o_proj`.
    #[must_use]
    pub fn mean_contribution(&self, head: usize) -> f64 {
        self.contribution.get(head).copied().unwrap_or(0.0) * self.per_token()
    }
}
