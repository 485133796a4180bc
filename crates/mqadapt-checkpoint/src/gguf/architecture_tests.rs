//! What architectures other than Llama's store differently, and files in which it is wrong.

use mqadapt_core::DType;
use serde_json::json;

use crate::gguf::ggml_type::GgmlType;
use crate::gguf::open::Model;
use crate::gguf::test_writer::{HEAD_DIM, HEADS, HIDDEN, KV_HEADS, TestFile, tiny_llama, values};
use crate::gguf::{Gguf, check_gguf_bytes};

/// The tiny Llama under another architecture's name.
fn renamed(architecture: &str, ty: GgmlType) -> TestFile {
    let mut file = tiny_llama(ty);
    for (key, _) in &mut file.pairs {
        if let Some(rest) = key.strip_prefix(b"llama.") {
            *key = [architecture.as_bytes(), b".", rest].concat();
        }
    }
    file.text("general.architecture", architecture)
}

fn without_tensors(mut file: TestFile, modules: &[&str]) -> TestFile {
    file.tensors.retain(|tensor| {
        let name = String::from_utf8(tensor.name.clone()).unwrap();
        !modules.iter().any(|module| name.ends_with(&format!(".{module}.weight")))
    });
    file
}

const QKV_ROWS: u64 = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

fn phi3(ty: GgmlType) -> TestFile {
    let mut file = without_tensors(renamed("phi3", ty), &["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"]);
    for layer in 0..2 {
        for (module, rows) in [("attn_qkv", QKV_ROWS), ("ffn_up", 2 * HIDDEN)] {
            let data = values(layer + rows, &[rows, HIDDEN], ty);
            file = file.tensor(&format!("blk.{layer}.{module}.weight"), &[rows, HIDDEN], ty, data);
        }
    }
    file
}

fn gemma3() -> TestFile {
    let mut file = renamed("gemma3", GgmlType::F32);
    for layer in 0..2 {
        for (module, width) in [
            ("post_attention_norm", HIDDEN),
            ("post_ffw_norm", HIDDEN),
            ("attn_q_norm", HEAD_DIM),
            ("attn_k_norm", HEAD_DIM),
        ] {
            let data = values(layer + width, &[width], GgmlType::F32);
            file = file.tensor(&format!("blk.{layer}.{module}.weight"), &[width], GgmlType::F32, data);
        }
    }
    file
}

#[track_caller]
fn refused(file: &TestFile, expected: &str) {
    let error = check_gguf_bytes(&file.bytes()).expect_err("the file is wrong").to_string();
    assert!(error.contains(expected), "expected '{expected}' in '{error}'");
}

/// All values of a tensor in f32.
fn read(file: &TestFile, name: &str) -> Vec<f32> {
    let bytes = file.bytes();
    let source = bytes.as_slice();
    let (gguf, _, tensors) = Gguf::keep(Model::read(&source).unwrap());
    let tensor = tensors.iter().find(|tensor| tensor.name == name).unwrap();
    let mut out = vec![0; 4 * tensor.len()];
    gguf.read_as(&source, tensor, DType::F32, 0, &mut out).unwrap();
    out.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

fn stored(file: &mut TestFile, name: &str) -> Vec<f32> {
    file.tensor_mut(name).data.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

#[test]
fn fused_rows_are_split() {
    for ty in GgmlType::ALL {
        check_gguf_bytes(&phi3(ty).bytes()).unwrap();
    }
    let mut file = phi3(GgmlType::F32);
    let parts = ["q_proj", "k_proj", "v_proj"].map(|part| format!("model.layers.1.self_attn.{part}.weight"));
    let joined: Vec<f32> = parts.iter().flat_map(|name| read(&file, name)).collect();
    assert_eq!(joined, stored(&mut file, "blk.1.attn_qkv.weight"));
    let parts = ["gate_proj", "up_proj"].map(|part| read(&file, &format!("model.layers.0.mlp.{part}.weight")));
    assert_eq!(parts.concat(), stored(&mut file, "blk.0.ffn_up.weight"));
}

#[test]
fn fused_rows_that_do_not_add_up() {
    let shape = [QKV_ROWS - 1, HIDDEN];
    let file = phi3(GgmlType::F32);
    let file = file.tensor("blk.1.attn_qkv.weight", &shape, GgmlType::F32, values(1, &shape, GgmlType::F32));
    refused(&file, "tensor 'blk.1.attn_qkv.weight' has shape [127, 256], which is not that of");
    let shape = [QKV_ROWS, HIDDEN];
    let file = phi3(GgmlType::F32);
    let file = file.tensor("blk.2.attn_qkv.weight", &shape, GgmlType::F32, values(1, &shape, GgmlType::F32));
    refused(&file, "tensor 'blk.2.attn_qkv.weight' has shape [128, 256], which is not that of");
}

#[test]
fn factors_of_long_rope() {
    let table = |file: TestFile, name: &str, values: &[f32]| {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        file.tensor(name, &[values.len() as u64], GgmlType::F32, data)
    };
    let (short, long) = ("rope_factors_short.weight", "rope_factors_long.weight");
    let file = || phi3(GgmlType::F32).u32("phi3.rope.scaling.original_context_length", 32);
    refused(&table(file(), long, &[1.0; 8]), "tensor 'rope_factors_short.weight' is missing");
    refused(&table(file(), short, &[1.0; 8]), "tensor 'rope_factors_long.weight' is missing");
    let both = |values: &[f32]| table(table(file(), short, values), long, &[2.5; 8]);
    refused(&both(&[1.0; 7]), "expected 8 factors, one per frequency, found 7");
    refused(&both(&[-1.0; 8]), "holds a factor that is not a positive number");
    refused(&both(&[1.1; 8]).u32("phi3.rope.dimension_count", 17), "must be even and at most 16; found 17");

    let json = |file: &TestFile| Model::read(&file.bytes().as_slice()).unwrap().config.json;
    // transformers computes sqrt(1 + ln 2 / ln 32) from the two contexts; the file says 1
    let config = json(&both(&[1.1; 8]));
    assert_eq!(config["rope_parameters"]["attention_factor"], json!(1.0));
    assert_eq!(config["rope_scaling"], json!(null));
    let config = json(&both(&[1.1; 8]).f32("phi3.rope.scaling.attn_factor", 1.2_f32.sqrt()));
    assert_eq!(config["rope_parameters"]["attention_factor"], json!(null));
    assert_eq!(config["rope_scaling"]["short_factor"], json!([1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1]));
}

#[test]
fn one_is_taken_off_the_weights_of_norms() {
    let mut file = gemma3();
    for (own, theirs) in [
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight"),
        ("model.layers.1.self_attn.k_norm.weight", "blk.1.attn_k_norm.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("model.layers.0.post_feedforward_layernorm.weight", "blk.0.post_ffw_norm.weight"),
    ] {
        let expected: Vec<f32> = stored(&mut file, theirs).into_iter().map(|value| value - 1.0).collect();
        assert_eq!(read(&file, own), expected, "{own}");
    }
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(read(&file, name), stored(&mut file, "blk.0.attn_q.weight"), "rows are not permuted");
}

#[test]
fn windows_of_gemma() {
    let types = |file: TestFile| Model::read(&file.bytes().as_slice()).unwrap().config.json["layer_types"].clone();
    let window = || gemma3().u32("gemma3.attention.sliding_window", 16);
    assert_eq!(types(gemma3()), json!(["full_attention", "full_attention"]));
    assert_eq!(types(window()), json!(["sliding_attention", "sliding_attention"]));
    let pattern = "gemma3.attention.sliding_window_pattern";
    assert_eq!(types(window().u32(pattern, 2)), json!(["sliding_attention", "full_attention"]));
    refused(&window().u32(pattern, 0), "must not be 0");
}
