//! Writes small GGUF files for tests, right or wrong ones.

use super::ggml_type::GgmlType;

/// A file to be: pairs and tensors in order, with the numbers that a test may want to get wrong.
#[derive(Clone)]
pub(crate) struct TestFile {
    pub magic: [u8; 4],
    pub version: u32,
    pub pairs: Vec<(Vec<u8>, Vec<u8>)>,
    pub tensors: Vec<TestTensor>,
    /// Written in place of the real counts.
    pub tensor_count: Option<u64>,
    pub pair_count: Option<u64>,
}

#[derive(Clone)]
pub(crate) struct TestTensor {
    pub name: Vec<u8>,
    /// Outermost first.
    pub shape: Vec<u64>,
    pub number: u32,
    pub data: Vec<u8>,
    /// Written in place of the real offset.
    pub offset: Option<u64>,
}

const ALIGNMENT: usize = 32;

pub(crate) fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

impl TestFile {
    pub(crate) fn new() -> Self {
        Self { magic: *b"GGUF", version: 3, pairs: vec![], tensors: vec![], tensor_count: None, pair_count: None }
    }

    /// A pair from its type number and its bytes.
    pub(crate) fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.pairs.retain(|(old, _)| old != key.as_bytes());
        self.pairs.push((key.into(), [&kind.to_le_bytes(), value].concat()));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.pairs.retain(|(old, _)| old != key.as_bytes());
        self
    }

    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &text(value))
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn flag(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, &[u8::from(value)])
    }

    pub(crate) fn array(self, key: &str, kind: u32, count: usize, values: &[u8]) -> Self {
        self.raw(key, 9, &[&kind.to_le_bytes()[..], &(count as u64).to_le_bytes(), values].concat())
    }

    pub(crate) fn texts(self, key: &str, values: &[&str]) -> Self {
        self.array(key, 8, values.len(), &values.iter().flat_map(|value| text(value)).collect::<Vec<_>>())
    }

    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Self {
        self.array(key, 5, values.len(), &values.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn f32s(self, key: &str, values: &[f32]) -> Self {
        self.array(key, 6, values.len(), &values.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], ty: GgmlType, data: Vec<u8>) -> Self {
        let (shape, number) = (shape.to_vec(), ty.number());
        self.tensors.retain(|tensor| tensor.name != name.as_bytes());
        self.tensors.push(TestTensor { name: name.into(), shape, number, data, offset: None });
        self
    }

    /// The tensor of this name, to be got wrong.
    pub(crate) fn tensor_mut(&mut self, name: &str) -> &mut TestTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes()).expect("the test wrote it")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.magic);
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            out.extend((key.len() as u64).to_le_bytes());
            out.extend(key);
            out.extend(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            out.extend((tensor.name.len() as u64).to_le_bytes());
            out.extend(&tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            out.extend(tensor.shape.iter().rev().flat_map(|size| size.to_le_bytes()));
            out.extend(tensor.number.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset as u64).to_le_bytes());
            offset = (offset + tensor.data.len()).next_multiple_of(ALIGNMENT);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

/// Bytes of a linear congruential generator.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

fn f32_noise(seed: u64, count: usize) -> Vec<u8> {
    noise(seed, count).into_iter().flat_map(|byte| (f32::from(byte) / 64.0 - 2.0).to_le_bytes()).collect()
}

/// Sizes of [`tiny_llama`].
pub(crate) const HIDDEN: u64 = 256;
pub(crate) const HEADS: u64 = 4;
pub(crate) const KV_HEADS: u64 = 2;
pub(crate) const HEAD_DIM: u64 = 16;
pub(crate) const VOCAB: u64 = 8;

/// Noise that fills a tensor. Quantised blocks get whatever scales it makes.
pub(crate) fn values(seed: u64, shape: &[u64], ty: GgmlType) -> Vec<u8> {
    let count = shape.iter().product::<u64>() as usize;
    match ty {
        GgmlType::F32 => f32_noise(seed, count),
        _ => noise(seed, count / ty.block_values() * ty.block_bytes()),
    }
}

/// A model with two layers, matrices of one type, norms of F32, and no tokenizer.
pub(crate) fn tiny_llama(ty: GgmlType) -> TestFile {
    let mut out = TestFile::new()
        .text("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", HIDDEN as u32)
        .u32("llama.feed_forward_length", HIDDEN as u32)
        .u32("llama.attention.head_count", HEADS as u32)
        .u32("llama.attention.head_count_kv", KV_HEADS as u32)
        .u32("llama.attention.key_length", HEAD_DIM as u32)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .f32("llama.rope.freq_base", 10_000.0)
        .tensor("token_embd.weight", &[VOCAB, HIDDEN], ty, values(1, &[VOCAB, HIDDEN], ty))
        .tensor("output_norm.weight", &[HIDDEN], GgmlType::F32, f32_noise(2, HIDDEN as usize));
    for layer in 0..2 {
        let (query, key) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        for (module, shape) in [
            ("attn_q", [query, HIDDEN]),
            ("attn_k", [key, HIDDEN]),
            ("attn_v", [key, HIDDEN]),
            ("ffn_gate", [HIDDEN, HIDDEN]),
            ("ffn_up", [HIDDEN, HIDDEN]),
            ("ffn_down", [HIDDEN, HIDDEN]),
        ] {
            let seed = 10 * (layer + 1) + shape[0] + module.len() as u64;
            out = out.tensor(&format!("blk.{layer}.{module}.weight"), &shape, ty, values(seed, &shape, ty));
        }
        // its rows are `query` long, which a block of 256 does not divide
        let (shape, ty) = ([HIDDEN, query], if ty.block_values() > 64 { GgmlType::Q8_0 } else { ty });
        out = out.tensor(&format!("blk.{layer}.attn_output.weight"), &shape, ty, values(5, &shape, ty));
        for norm in ["attn_norm", "ffn_norm"] {
            let name = format!("blk.{layer}.{norm}.weight");
            out = out.tensor(&name, &[HIDDEN], GgmlType::F32, f32_noise(layer, HIDDEN as usize));
        }
    }
    out
}
