//! The header of a safetensors file. The bytes are a whole file. What parses must be contiguous and fill the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mqadapt_checkpoint::Header;

fuzz_target!(|file: &[u8]| {
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else { return };
    let Ok(len) = usize::try_from(u64::from_le_bytes(*prefix)) else { return };
    let Some(json) = rest.get(..len) else { return };
    if let Ok(header) = Header::parse(json, file.len() as u64) {
        let mut end = 0;
        for entry in &header.entries {
            assert_eq!(entry.start, end);
            let bits = entry.shape.iter().product::<usize>() * entry.dtype.bitsize();
            assert_eq!(entry.bytes as usize * 8, bits);
            end += entry.bytes;
        }
        assert_eq!(header.data_start + end, file.len() as u64);
    }
});
