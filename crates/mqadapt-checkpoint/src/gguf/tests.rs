//! One test for each way in which a file can be wrong, and for each thing that is read from a right one.

use mqadapt_core::DType;
use serde_json::json;

use super::check_gguf_bytes;
use super::ggml_type::GgmlType;
use super::open::Model;
use super::test_writer::{HEAD_DIM, HEADS, HIDDEN, KV_HEADS, TestFile, VOCAB, text, tiny_llama, values};
use super::{Gguf, dequantize, names};

fn error(bytes: &[u8]) -> String {
    check_gguf_bytes(bytes).expect_err("the file is wrong").to_string()
}

#[track_caller]
fn refused(file: &TestFile, expected: &str) {
    let error = error(&file.bytes());
    assert!(error.contains(expected), "expected '{expected}' in '{error}'");
}

fn tiny() -> TestFile {
    tiny_llama(GgmlType::F32)
}

fn model(file: &TestFile) -> Model {
    Model::read(&file.bytes().as_slice()).unwrap()
}

#[test]
fn a_right_file_is_read() {
    for ty in GgmlType::ALL {
        check_gguf_bytes(&tiny_llama(ty).bytes()).unwrap();
    }
    let mut version_2 = tiny();
    version_2.version = 2;
    check_gguf_bytes(&version_2.bytes()).unwrap();
}

#[test]
fn every_truncation_is_refused() {
    let bytes = tiny().texts("some.texts", &["one", "two"]).bytes();
    for length in (0..1500).chain([bytes.len() / 2, bytes.len() - 1]) {
        error(&bytes[..length]);
    }
}

#[test]
fn wrong_magic() {
    let mut file = tiny();
    file.magic = *b"GGML";
    refused(&file, "expected a GGUF file, or a folder");
}

#[test]
fn wrong_version() {
    for version in [0, 1, 4, 77] {
        let mut file = tiny();
        file.version = version;
        refused(&file, &format!("(found {version})"));
    }
}

#[test]
fn big_endian() {
    let mut file = tiny();
    file.version = 3_u32.swap_bytes();
    refused(&file, "big-endian");
}

#[test]
fn counts_beyond_the_file() {
    for count in [1 << 20, u64::MAX] {
        let mut file = tiny();
        file.tensor_count = Some(count);
        refused(&file, "the tensor count");
        let mut file = tiny();
        file.pair_count = Some(count);
        refused(&file, "the metadata count");
    }
}

#[test]
fn array_longer_than_the_file() {
    for kind in [0, 4, 8, 10, 12] {
        refused(&tiny().array("a.b", kind, usize::MAX / 2, &[]), "metadata key 'a.b' needs");
        refused(&tiny().array("a.b", kind, 1 << 40, &[]), "metadata key 'a.b' needs");
    }
}

#[test]
fn string_longer_than_the_file() {
    refused(&tiny().raw("a.b", 8, &u64::MAX.to_le_bytes()), "metadata key 'a.b'");
    refused(&tiny().raw("a.b", 8, &(1_u64 << 28).to_le_bytes()), "metadata key 'a.b' needs");
}

#[test]
fn key_not_utf_8() {
    let mut file = tiny();
    file.pairs.push((vec![0xff, 0xfe], vec![7, 0, 0, 0, 1]));
    refused(&file, "not UTF-8");
}

#[test]
fn value_not_utf_8() {
    refused(&tiny().raw("a.b", 8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xc3, 0x28]), "not UTF-8");
}

#[test]
fn tensor_name_not_utf_8() {
    let mut file = tiny();
    file.tensors[0].name = vec![0x80; 4];
    refused(&file, "not UTF-8");
}

#[test]
fn duplicate_key() {
    let mut file = tiny();
    file.pairs.push(file.pairs[0].clone());
    refused(&file, "metadata key 'general.architecture' occurs twice");
}

#[test]
fn duplicate_tensor() {
    let mut file = tiny();
    file.tensors.push(file.tensors[0].clone());
    refused(&file, "tensor 'token_embd.weight' occurs twice");
}

#[test]
fn unknown_value_type() {
    refused(&tiny().raw("a.b", 13, &[0; 8]), "unknown value type 13");
    refused(&tiny().array("a.b", 13, 1, &[0; 8]), "unknown value type 13");
}

#[test]
fn nested_arrays() {
    let inner = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat();
    refused(&tiny().array("a.b", 9, 1, &inner.repeat(100)), "array of arrays");
}

#[test]
fn boolean_that_is_neither() {
    refused(&tiny().raw("a.b", 7, &[2]), "expected a boolean");
}

#[test]
fn rank_zero_and_too_high() {
    for shape in [vec![], vec![1; 5], vec![1; 1000]] {
        let mut file = tiny();
        file.tensor_mut("output_norm.weight").shape = shape;
        refused(&file, "expected 1 to 4 dimensions");
    }
}

#[test]
fn dimension_of_zero() {
    let mut file = tiny();
    file.tensor_mut("output_norm.weight").shape = vec![0];
    refused(&file, "dimension of zero");
}

#[test]
fn shape_that_overflows() {
    for shape in [vec![u64::MAX / 2, 4], vec![1 << 62, 1 << 62], vec![1 << 62]] {
        let mut file = tiny();
        file.tensor_mut("output_norm.weight").shape = shape;
        refused(&file, "overflows");
    }
}

#[test]
fn unsupported_tensor_type_is_named() {
    let mut file = tiny();
    file.tensor_mut("token_embd.weight").number = 10;
    refused(&file, "tensor 'token_embd.weight' has type Q2_K (number 10); supported are F32");
}

#[test]
fn row_that_is_not_whole_blocks() {
    let file = tiny().tensor("token_embd.weight", &[VOCAB, 100], GgmlType::Q4_0, vec![0; 800 / 32 * 18]);
    refused(&file, "rows of 100 values");
}

#[test]
fn offset_beyond_the_file() {
    for offset in [1 << 40, u64::MAX - 31] {
        let mut file = tiny();
        file.tensor_mut("token_embd.weight").offset = Some(offset);
        refused(&file, "beyond the end of the file");
    }
}

#[test]
fn offset_not_aligned() {
    let mut file = tiny();
    file.tensor_mut("token_embd.weight").offset = Some(8);
    refused(&file, "not a multiple of the alignment 32");
}

#[test]
fn overlapping_tensors() {
    let mut file = tiny();
    file.tensor_mut("blk.0.attn_q.weight").offset = Some(0);
    refused(&file, "overlaps tensor");
}

#[test]
fn alignment_that_cannot_be() {
    for alignment in [0, 3, 48, 1 << 30] {
        refused(&tiny().u32("general.alignment", alignment), "expected a power of two");
    }
    refused(&tiny().text("general.alignment", "32"), "expected an integer of at least 0, found a string");
}

#[test]
fn another_architecture() {
    refused(&tiny().text("general.architecture", "falcon"), "is 'falcon'; supported are llama, qwen2");
    refused(&tiny().without("general.architecture"), "'general.architecture' is missing");
}

#[test]
fn missing_metadata() {
    for key in ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"] {
        let key = format!("llama.{key}");
        refused(&tiny().without(&key), &format!("metadata key '{key}' is missing"));
    }
}

#[test]
fn sizes_that_cannot_be() {
    refused(&tiny().u32("llama.block_count", 0), "llama.block_count");
    refused(&tiny().u32("llama.block_count", u32::MAX), "llama.block_count");
    refused(&tiny().u32("llama.attention.head_count", 0), "num_attention_heads");
    refused(&tiny().u32("llama.attention.head_count_kv", 3), "num_key_value_heads");
    refused(&tiny().u32("llama.attention.key_length", 0), "head_dim");
    refused(&tiny().u32("llama.attention.value_length", 8), "llama.attention.value_length");
    refused(&tiny().u32("llama.rope.dimension_count", 8), "llama.rope.dimension_count");
    refused(&tiny().f32("llama.attention.layer_norm_rms_epsilon", f32::NAN), "finite float");
    refused(&tiny().f32("llama.rope.freq_base", -1.0), "must be positive");
    refused(&tiny().raw("llama.block_count", 5, &(-1_i32).to_le_bytes()), "an integer of at least 0");
}

#[test]
fn mixture_of_experts_and_split_files() {
    refused(&tiny().u32("llama.expert_count", 8), "mixture of experts");
    refused(&tiny().u32("split.count", 2), "llama-gguf-split --merge");
}

#[test]
fn unknown_rope_scaling() {
    refused(&tiny().text("llama.rope.scaling.type", "su"), "'su' is not supported");
    let yarn = || tiny().text("llama.rope.scaling.type", "yarn");
    refused(&yarn(), "'llama.rope.scaling.factor' is missing");
    refused(&yarn().f32("llama.rope.scaling.attn_factor", 0.5), "is 0.5; supported is 1 only");
}

#[test]
fn missing_tensor() {
    let mut file = tiny();
    file.tensors.retain(|tensor| tensor.name != b"blk.1.attn_k.weight");
    refused(&file, "tensor 'blk.1.attn_k.weight' is missing");
}

#[test]
fn tensor_of_another_model() {
    let file = tiny().tensor("blk.0.ffn_gate_inp.weight", &[HIDDEN], GgmlType::F32, vec![0; 1024]);
    refused(&file, "tensor 'blk.0.ffn_gate_inp.weight' is not part of a model");
    let file = tiny().tensor("blk.7.attn_norm.weight", &[HIDDEN], GgmlType::F32, vec![0; 1024]);
    refused(&file, "tensor 'blk.7.attn_norm.weight' does not fit");
}

#[test]
fn tensor_of_the_wrong_shape() {
    let file = tiny().tensor("blk.0.attn_k.weight", &[HIDDEN, HIDDEN], GgmlType::F32, vec![0; 4 << 16]);
    refused(&file, "has shape [256, 256], but the metadata says [32, 256]");
}

#[test]
fn bias_of_one_module_only() {
    let file = tiny().tensor("blk.0.attn_q.bias", &[HEADS * HEAD_DIM], GgmlType::F32, vec![0; 256]);
    refused(&file, "bias' is missing");
}

#[test]
fn configuration() {
    let config = model(&tiny()).config;
    assert_eq!(config.json["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.head_dim), (256, 2, 16));
    assert_eq!(config.num_key_value_heads, [2, 2]);
    assert_eq!(config.rms_norm_eps, 1e-5, "not the f32 nearest to it");
    assert!(config.tie_word_embeddings);
    assert_eq!(config.dtype, Some(DType::F32));
    assert_eq!(model(&tiny_llama(GgmlType::F16)).config.dtype, Some(DType::F16));
    assert_eq!(model(&tiny_llama(GgmlType::Q4_0)).config.dtype, Some(DType::BF16));

    let untied = tiny().tensor("output.weight", &[VOCAB, HIDDEN], GgmlType::F32, vec![0; 8192]);
    assert!(!model(&untied).config.tie_word_embeddings);
    let linear = tiny().text("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 2.0);
    assert_eq!(model(&linear).config.json["rope_scaling"], json!({"rope_type": "linear", "factor": 2.0}));
}

#[test]
fn heads_of_each_layer() {
    let shape = [HEAD_DIM, HIDDEN];
    let file = tiny()
        .i32s("llama.attention.head_count_kv", &[2, 1])
        .tensor("blk.1.attn_k.weight", &shape, GgmlType::F32, values(3, &shape, GgmlType::F32))
        .tensor("blk.1.attn_v.weight", &shape, GgmlType::F32, values(4, &shape, GgmlType::F32));
    let config = model(&file).config;
    assert_eq!(config.num_key_value_heads, [2, 1]);
    assert_eq!(config.json["per_layer_config"], json!({"01": {"num_key_value_heads": 1}}));
    refused(&tiny().i32s("llama.attention.head_count_kv", &[2, 1, 2]), "expected 2 entries, one per layer");
}

/// The whole tensor by the formula of the converter, undone: every value of every row.
fn expected(data: &[u8], ty: GgmlType, rows: usize, permuted: bool) -> Vec<f32> {
    let mut bytes = vec![0; 4 * data.len() / ty.block_bytes() * ty.block_values()];
    dequantize::to_f32(ty, data, &mut bytes);
    let stored: Vec<f32> = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
    let row = stored.len() / rows;
    let source = |r| if permuted { names::permuted_row(r, HEAD_DIM as usize) } else { r };
    (0..rows).flat_map(|r| stored[source(r) * row..][..row].to_vec()).collect()
}

fn read(file: &TestFile, name: &str, first: usize, count: usize) -> Vec<f32> {
    let bytes = file.bytes();
    let (gguf, _, tensors) = Gguf::keep(model(file));
    let tensor = tensors.iter().find(|tensor| tensor.name == name).unwrap();
    let mut out = vec![0; 4 * count];
    gguf.read_as(&bytes.as_slice(), tensor, DType::F32, first, &mut out).unwrap();
    out.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

#[test]
fn any_range_of_any_type_in_hugging_face_order() {
    for ty in GgmlType::ALL {
        let mut file = tiny_llama(ty);
        for (stored, name, rows) in [
            ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", HEADS * HEAD_DIM),
            ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight", KV_HEADS * HEAD_DIM),
            ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight", KV_HEADS * HEAD_DIM),
            ("token_embd.weight", "model.embed_tokens.weight", VOCAB),
        ] {
            let permuted = stored.contains("attn_q") || stored.contains("attn_k");
            let whole = expected(&file.tensor_mut(stored).data, ty, rows as usize, permuted);
            let last = whole.len();
            for (first, end) in
                [(0, last), (1, last - 1), (100, 101), (255, 258), (300, 2000), (16 * 256, 32 * 256), (last, last)]
            {
                let (first, end) = (first.min(last), end.min(last));
                let found = read(&file, name, first, end - first);
                assert!(same(&found, &whole[first..end]), "{ty:?} {name} {first}..{end}");
            }
        }
    }
}

#[test]
fn biases_are_permuted_like_their_weights() {
    let rows = |name: &str| if name.contains("_q") { HEADS * HEAD_DIM } else { KV_HEADS * HEAD_DIM };
    let mut file = tiny();
    for layer in 0..2 {
        for module in ["attn_q", "attn_k", "attn_v"] {
            let data: Vec<u8> = (0..rows(module)).flat_map(|n| (n as f32).to_le_bytes()).collect();
            file = file.tensor(&format!("blk.{layer}.{module}.bias"), &[rows(module)], GgmlType::F32, data);
        }
        file = file.tensor(&format!("blk.{layer}.attn_output.bias"), &[HIDDEN], GgmlType::F32, vec![0; 1024]);
    }
    assert!(model(&file).config.qkv_bias);
    let found = read(&file, "model.layers.0.self_attn.k_proj.bias", 0, 32);
    let expected: Vec<f32> = (0..32).map(|row| names::permuted_row(row, HEAD_DIM as usize) as f32).collect();
    assert_eq!(found, expected);
    assert_eq!(read(&file, "model.layers.0.self_attn.k_proj.bias", 3, 9), expected[3..12]);
    assert_eq!(read(&file, "model.layers.1.self_attn.v_proj.bias", 5, 2), [5.0, 6.0]);
}

#[test]
fn noise_never_panics() {
    let bytes = tiny().texts("tokenizer.ggml.tokens", &["a", "b"]).bytes();
    for (seed, at) in (0..1400).enumerate() {
        let mut broken = bytes.clone();
        broken[at] = broken[at].wrapping_add(1 + (seed % 250) as u8);
        let _ = check_gguf_bytes(&broken);
    }
}

#[test]
fn control_characters_in_names_are_escaped() {
    let file = tiny().raw("bad\u{1b}[2J", 8, &text("x")).raw("bad\u{1b}[2J", 99, &[]);
    assert!(!error(&file.bytes()).contains('\u{1b}'));
}
