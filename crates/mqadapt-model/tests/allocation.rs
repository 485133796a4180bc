//! Generation in its steady state allocates nothing: counted by the allocator itself, on every thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::{ModelConfig, NoProgress};
use mqadapt_model::{GenerateOptions, LoadOptions, Model};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Counts what it passes on.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn model() -> Model {
    let json = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 300,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true}"#;
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), json).unwrap();
    let config = ModelConfig::from_json(json).unwrap();
    let bytes: Vec<u8> = (0..300 * 64u32).flat_map(|i| ((i * 37 % 101) as f32 / 400.0 - 0.1).to_le_bytes()).collect();
    let views = config.tensors().into_iter().map(|tensor| {
        let len = tensor.shape.iter().product::<usize>() * 4;
        (tensor.name, TensorView::new(Dtype::F32, tensor.shape, &bytes[..len]).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    Model::load(&checkpoint, &LoadOptions::default(), &NoProgress).unwrap()
}

/// Three sequences side by side; the counts are taken when tokens come out, so everything between two tokens is counted.
#[test]
fn a_token_allocates_nothing() {
    let model = model();
    let prompts = [vec![1, 2, 3], vec![1, 2, 4, 5], vec![9]];
    for temperature in [0.0, 0.8] {
        let options = GenerateOptions {
            max_new_tokens: 200,
            temperature,
            top_k: (temperature > 0.0).then_some(40),
            top_p: (temperature > 0.0).then_some(0.9),
            ..GenerateOptions::default()
        };
        let mut counts = [0; 600];
        // the first text sizes the buffers that last; of the second, the first pass sizes those of the call
        for _ in 0..2 {
            let mut told = 0;
            let mut on_token = |_, _| {
                counts[told] = ALLOCATIONS.load(Ordering::Relaxed);
                told += 1;
                true
            };
            model.generate(&prompts, &options, &mut on_token, &NoProgress).unwrap();
            assert_eq!(told, 600);
        }
        assert_eq!(counts[599] - counts[3], 0, "temperature {temperature}");
        assert!(counts[3] > 0);
    }
}
