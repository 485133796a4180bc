//! `model.safetensors.index.json`. In: bytes that may be anything; out: which shard holds each tensor, checked.

use serde::Deserialize;

use crate::header::Pairs;

/// The name of the index in a folder.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The name of the only shard where there is no index.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// Longest index that is read.
pub(crate) const MAX_INDEX_BYTES: u64 = 100_000_000;

/// The index of a sharded checkpoint.
#[derive(Debug)]
pub(crate) struct Index {
    /// Tensor and shard, in the file's order.
    pub weight_map: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: Pairs<String>,
}

impl Index {
    /// Parses an index; the problem in words otherwise.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let raw: RawIndex = serde_json::from_slice(json).map_err(|e| format!("cannot be read: {e}"))?;
        let weight_map = raw.weight_map.0;
        for (name, shard) in &weight_map {
            if !is_plain_file_name(shard) {
                return Err(format!(
                    "'{name}' is said to be in {shard:?}, which is not the plain name of a .safetensors file in this folder"
                ));
            }
        }
        Ok(Self { weight_map })
    }

    /// The shards' names in order, each once.
    pub fn shards(&self) -> Vec<&str> {
        let mut shards: Vec<&str> = self.weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
        shards.sort_unstable();
        shards.dedup();
        shards
    }
}

/// The shards that an index names: what the fuzz target looks at.
///
/// # Errors
/// The problem in words.
#[doc(hidden)]
pub fn index_shards(json: &[u8]) -> Result<Vec<String>, String> {
    Ok(Index::parse(json)?.shards().into_iter().map(str::to_owned).collect())
}

/// Whether a name stays in its folder: no separators of any system, no drive, nothing hidden or special.
fn is_plain_file_name(name: &str) -> bool {
    name.ends_with(".safetensors")
        && !name.starts_with('.')
        && name.len() <= 255
        && !name.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_shards_in_order() {
        let index = Index::parse(
            br#"{"metadata": {"total_size": 3}, "weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors", "c": "m-2.safetensors"}}"#,
        )
        .unwrap();
        assert_eq!(index.shards(), ["m-1.safetensors", "m-2.safetensors"]);
        assert_eq!(index.weight_map[0], ("b".to_owned(), "m-2.safetensors".to_owned()));
    }

    #[test]
    fn refuses_places_outside_the_folder() {
        for shard in [
            "../a.safetensors",
            "/etc/a.safetensors",
            "x/a.safetensors",
            r"..\\a.safetensors",
            "C:a.safetensors",
            "..",
            "",
            ".safetensors",
            "a.bin",
            "a\\u0000.safetensors",
        ] {
            let json = format!(r#"{{"weight_map": {{"t": "{shard}"}}}}"#);
            let problem = Index::parse(json.as_bytes()).unwrap_err();
            assert!(problem.contains("'t'") && problem.contains("plain name"), "{shard}: {problem}");
        }
    }

    #[test]
    fn refuses_a_tensor_named_twice() {
        let problem = Index::parse(br#"{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}"#).unwrap_err();
        assert!(problem.contains("'t' occurs twice"), "{problem}");
    }

    #[test]
    fn refuses_what_is_no_index() {
        for json in [
            &b""[..],
            b"[]",
            b"{}",
            br#"{"weight_map": []}"#,
            br#"{"weight_map": {"t": 3}}"#,
            b"{\"weight_map\": {\"\xff\": \"a\"}}",
        ] {
            assert!(Index::parse(json).is_err(), "{}", String::from_utf8_lossy(json));
        }
    }
}
