//! A GGUF file: header, metadata, tensors of every type, and the tokenizer that its metadata describes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let _ = mqadapt_checkpoint::check_gguf_bytes(file);
});
