//! Writing a statistics file: one pass over the text, layer by layer, into a temporary file that takes its name at the end.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{Moment, Needs};
use mqadapt_core::Progress;
use mqadapt_core::family::EMBED_TOKENS;
use mqadapt_model::{LayerTrace, Spill, StreamedLayer, embed};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::Xxh3;

use super::header::{EMBEDDING_WEIGHTS, Hashes, failed, layer_weights, layout, names_of, sealed, values};
use super::reader::StatisticsFile;
use crate::calibration::Calibration;
use crate::collector::Collector;
use crate::weights::attention;
use crate::{Error, Result};

/// Any method may be given the file.
const EVERYTHING: Needs = Needs { moments: &Moment::ALL, inputs: true };

/// One pass over the text: the statistics of every layer, written to `path`. The residual stream goes to a file where it is
/// more than `spill` allows. Progress: layers, phase `calibrate`.
///
/// # Errors
/// [`Error::Argument`] for a target context longer than every sequence; [`Error::Io`] where the file cannot be written; as
/// running the model.
pub fn collect_statistics(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    path: &Path,
    spill: Option<&Spill>,
    progress: &dyn Progress,
) -> Result<StatisticsFile> {
    calibration.check_target_contexts(&calibration.lengths())?;
    let config = checkpoint.config();
    let written = (|| -> Result<()> {
        let mut hashes = Hashes::new();
        let (header, data_bytes) = layout(checkpoint, calibration, &hashes)?;
        let (file, partial) = unfinished(path)?.into_parts();
        let mut out = BufWriter::with_capacity(1 << 20, Hashing { file, hash: Xxh3::new() });
        out.write_all(&header).and_then(|()| next_hash(&mut out).map(drop)).map_err(failed(&partial))?;
        hashes.insert(EMBEDDING_WEIGHTS.to_owned(), checkpoint.weights_digest([EMBED_TOKENS])?);
        let bytes = 4 * config.hidden_size * calibration.sequences.iter().map(Vec::len).sum::<usize>();
        let folder = spill.filter(|spill| bytes as u64 > spill.max_memory).map(|spill| spill.folder.as_path());
        let mut hidden = embed(checkpoint, &calibration.sequences, folder)?;
        for layer_idx in 0..config.num_hidden_layers {
            let layer = StreamedLayer::load(checkpoint, layer_idx, progress)?;
            // they have just been read: this reads them from memory
            hashes.insert(layer_weights(layer_idx), checkpoint.weights_digest(names_of(checkpoint, layer_idx))?);
            let geometry = attention(config, layer_idx)?;
            let progressing = layer.progressing(progress);
            let mut collector =
                Collector::new(&geometry, &layer.o_proj(checkpoint)?, calibration, layer_idx, 1, EVERYTHING)?;
            let mut collect = |trace: &LayerTrace<'_>| collector.add(trace, &progressing);
            layer.run_observed(&mut hidden, &mut collect, progress)?;
            let sample = collector.finish();
            let mut hash = |name: String, out: &mut BufWriter<Hashing>| -> Result<()> {
                hashes.insert(values(&format!("layers.{layer_idx}.{name}")), next_hash(out).map_err(failed(&partial))?);
                Ok(())
            };
            for (name, (_, values)) in sample.statistics.to_tensors() {
                progressing.tell()?;
                values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())).map_err(failed(&partial))?;
                hash(name, &mut out)?;
            }
            for (n, input) in sample.inputs.iter().enumerate() {
                input.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())).map_err(failed(&partial))?;
                hash(format!("inputs.{n}"), &mut out)?;
            }
        }
        let file = out.into_inner().map_err(|error| failed(&partial)(error.into_error()))?.file;
        file.write_all_at(&sealed(checkpoint, calibration, hashes, data_bytes)?, 0).map_err(failed(&partial))?;
        file.sync_all().map_err(failed(&partial))?;
        partial.persist_noclobber(path).map_err(|taken| failed(path)(taken.error))
    })();
    let there = |error: &Error| matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists);
    match written {
        // another process was faster
        Err(error) if there(&error) => match StatisticsFile::open(path) {
            Ok(saved) if saved.text() == calibration.fingerprint() => Ok(saved),
            _ => Err(error),
        },
        written => written.and_then(|()| StatisticsFile::open(path)),
    }
}

/// A file of a random name beside `path`: nothing that lies there is followed or emptied. It is removed after an error.
fn unfinished(path: &Path) -> Result<NamedTempFile> {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut refused = None; // the system's own error, which the builder wraps
    let made = tempfile::Builder::new().prefix(&prefix).suffix(".mqadapt-partial").make_in(folder, |path| {
        let file = File::create_new(path);
        refused = file.as_ref().err().and_then(std::io::Error::raw_os_error);
        file
    });
    made.map_err(|error| failed(path)(refused.map_or(error, std::io::Error::from_raw_os_error)))
}

/// A file, and a hash of what was written to it since the last one was taken.
struct Hashing {
    file: File,
    hash: Xxh3,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// The hash of what was written since the last call.
fn next_hash(out: &mut BufWriter<Hashing>) -> std::io::Result<String> {
    out.flush()?;
    let hash = &mut out.get_mut().hash;
    let digest = format!("{:032x}", hash.digest128());
    hash.reset();
    Ok(digest)
}
