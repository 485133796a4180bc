//! What else is in a checkpoint's folder and goes along when it is converted.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A file that goes along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideFile {
    /// Its path inside the checkpoint's folder, with `/` for a folder inside.
    pub name: String,
    /// What is in it.
    pub content: Content,
}

impl SideFile {
    /// Its length, as far as it can be told now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.content {
            Content::File(path) => fs::metadata(path).map_or(0, |metadata| metadata.len()),
            Content::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// Where the content of a side file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// In this file, to be copied.
    File(PathBuf),
    /// Here (made from a GGUF file's metadata).
    Bytes(Vec<u8>),
}

/// Folders inside a checkpoint that belong to it; others (`original`, `onnx`, ...) hold other forms of the weights.
const FOLDERS: &[&str] = &["additional_chat_templates"];
/// Extensions of files that hold weights, and of those that a conversion has not finished.
const WEIGHTS: &[&str] = &[
    "safetensors",
    "partial",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "ggml",
    "h5",
    "msgpack",
    "onnx",
    "ot",
    "tflite",
    "npz",
];
/// Files that a conversion writes anew, and its journal.
const REWRITTEN: &[&str] = &["config.json", "mqadapt.json", "modeling_mqadapt.py", "mqadapt.journal.jsonl"];

/// Every file of the folder that is neither weights nor written anew, by name.
pub(crate) fn of_folder(folder: &Path) -> Result<Vec<SideFile>> {
    let mut out = Vec::new();
    collect(folder, "", &mut out)?;
    for inner in FOLDERS {
        let path = folder.join(inner);
        if path.is_dir() {
            collect(&path, &format!("{inner}/"), &mut out)?;
        }
    }
    out.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(out)
}

fn collect(folder: &Path, prefix: &str, out: &mut Vec<SideFile>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // metadata follows links; one that leads nowhere is left behind
        if goes_along(name) && fs::metadata(&path).is_ok_and(|m| m.is_file()) {
            out.push(SideFile { name: format!("{prefix}{name}"), content: Content::File(path.clone()) });
        }
    }
    Ok(())
}

fn goes_along(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    !name.starts_with('.')
        && !WEIGHTS.contains(&extension.as_str())
        && !name.ends_with(".index.json")
        && !REWRITTEN.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::goes_along;

    #[test]
    fn weights_and_rewritten_files_stay_behind() {
        for name in [
            "tokenizer.json",
            "tokenizer.model",
            "chat_template.jinja",
            "LICENSE",
            "README.md",
            "generation_config.json",
        ] {
            assert!(goes_along(name), "{name}");
        }
        for name in [
            "model.safetensors",
            "pytorch_model.bin",
            "consolidated.00.pth",
            "model.safetensors.index.json",
            "config.json",
            ".gitattributes",
            "q.GGUF",
        ] {
            assert!(!goes_along(name), "{name}");
        }
    }
}
