//! `overspill tpde`: pack, apply, verify, inspect, diff.

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand, ValueEnum};
use overspill_tpde::{
    Checkpoint, CodecChoice, Diff, Inspection, Options, PackOptions, Patch, apply, diff, inspect, pack,
    verify,
};
use serde_json::json;

use crate::Failure;
use crate::bar::Bar;
use crate::table::{columns, percent, print, print_json};

/// The arguments of `overspill tpde`.
#[derive(Debug, Parser)]
#[command(arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
    /// Show no progress bar and print nothing but what was asked for.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Most memory for buffers, e.g. 512MiB or 1GiB.
    #[arg(long, global = true, default_value = "1536MiB", value_parser = parse_bytes)]
    memory_budget: usize,
    /// Most threads; 0 takes one a core.
    #[arg(long, global = true, default_value_t = 0)]
    threads: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Codec {
    /// The smallest mode for each chunk.
    Auto,
    /// The first design: Elias-delta gaps and Zstandard values.
    EliasZstd,
    /// What a GPU applies fastest: a few percent larger, and slower on a CPU.
    Gpu,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Pack a checkpoint, against a base or alone.
    #[command(after_help = "Examples:
  overspill tpde pack --base step-100.safetensors --final step-101.safetensors -o 101.tpde
  overspill tpde pack --base hub/model --final tuned/model -o tuned.tpde     (sharded: folders or index files)
  overspill tpde pack --base model-q4_0.gguf --final model.safetensors -o residual.tpde
  overspill tpde pack --final model.safetensors -o model.tpde")]
    Pack {
        /// The state that the receiver holds: safetensors, a sharded checkpoint, or GGUF.
        #[arg(long, value_name = "A")]
        base: Option<PathBuf>,
        /// The state to pack: safetensors or a sharded checkpoint.
        #[arg(long = "final", value_name = "B")]
        final_state: PathBuf,
        /// The patch to write.
        #[arg(short, long, value_name = "P")]
        output: PathBuf,
        /// Positions and final words instead of steps: larger, may be applied twice.
        #[arg(long, requires = "base")]
        absolute: bool,
        /// Which codec.
        #[arg(long, value_enum, default_value = "auto")]
        codec: Codec,
        /// Print the result as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Rebuild the final checkpoint, bit for bit.
    #[command(after_help = "Examples:
  overspill tpde apply --base step-100.safetensors --patch 101.tpde -o step-101.safetensors
  overspill tpde apply --patch model.tpde -o model.safetensors")]
    Apply {
        /// The state that the patch starts from.
        #[arg(long, value_name = "A")]
        base: Option<PathBuf>,
        /// The patch.
        #[arg(long, value_name = "P")]
        patch: PathBuf,
        /// The checkpoint to write: a file, or a new folder where the final was sharded.
        #[arg(short, long, value_name = "B2")]
        output: PathBuf,
        /// Print the result as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Check every byte of a patch and, with its base, that it makes the state it promises.
    #[command(after_help = "Examples:
  overspill tpde verify 101.tpde
  overspill tpde verify 101.tpde --base step-100.safetensors")]
    Verify {
        /// The patch.
        #[arg(value_name = "P")]
        patch: PathBuf,
        /// The state that the patch starts from.
        #[arg(long, value_name = "A")]
        base: Option<PathBuf>,
        /// Print the result as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what a patch holds: bytes, ratio, changed share and modes, by tensor and in all.
    #[command(after_help = "Examples:
  overspill tpde inspect 101.tpde
  overspill tpde inspect 101.tpde --json | jq .ratio")]
    Inspect {
        /// The patch.
        #[arg(value_name = "P")]
        patch: PathBuf,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what changed between two checkpoints, with a histogram of steps in ULPs.
    #[command(after_help = "Examples:
  overspill tpde diff step-100.safetensors step-101.safetensors
  overspill tpde diff hub/model tuned/model --json")]
    Diff {
        /// The first checkpoint.
        a: PathBuf,
        /// The second.
        b: PathBuf,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Bytes: a whole number, with K, M or G (and iB, all powers of two) after it if wanted.
fn parse_bytes(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        _ => return Err("a number of bytes, or one with KiB, MiB or GiB after it".into()),
    };
    let count: usize = digits.trim().parse().map_err(|error| format!("{error}"))?;
    count.checked_mul(1 << shift).ok_or_else(|| "too many bytes".into())
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let options = Options { memory_bytes: args.memory_budget, threads: args.threads };
    let quiet = args.quiet;
    match args.command {
        Command::Pack { base, final_state, output, absolute, codec, json } => {
            let codec = match codec {
                Codec::Auto => CodecChoice::Auto,
                Codec::EliasZstd => CodecChoice::EliasZstd,
                Codec::Gpu => CodecChoice::Gpu,
            };
            let options = PackOptions { absolute, codec, run: options };
            run_pack(base.as_deref(), &final_state, &output, &options, quiet, json)
        }
        Command::Apply { base, patch, output, json } => {
            run_apply(base.as_deref(), &patch, &output, &options, quiet, json)
        }
        Command::Verify { patch, base, json } => run_verify(&patch, base.as_deref(), &options, quiet, json),
        Command::Inspect { patch, json } => run_inspect(&patch, &options, json),
        Command::Diff { a, b, json } => run_diff(&a, &b, &options, quiet, json),
    }
}

fn open(path: Option<&Path>) -> Result<Option<Checkpoint<'static>>, Failure> {
    Ok(path.map(Checkpoint::open).transpose()?)
}

fn run_pack(
    base: Option<&Path>,
    final_state: &Path,
    output: &Path,
    options: &PackOptions,
    quiet: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let base = open(base)?;
    let final_state = Checkpoint::open(final_state)?;
    let report = {
        let bar = Bar::new(quiet || as_json, "packing");
        pack(base.as_ref(), &final_state, output, options, &|done, total| bar.report(done, total))?
    };
    let ratio = report.raw_bytes as f64 / report.packed_bytes.max(1) as f64;
    if as_json {
        return print_json(&json!({
            "kind": report.kind.name(),
            "base_id": report.kind.base().map(|id| id.to_string()),
            "final_id": report.final_id.to_string(),
            "raw_bytes": report.raw_bytes, "packed_bytes": report.packed_bytes, "ratio": ratio,
        }));
    }
    if quiet {
        return Ok(());
    }
    print(&format!(
        "{}: {} patch, {} -> {} bytes ({ratio:.2}:1), makes state {}",
        output.display(),
        report.kind.name(),
        report.raw_bytes,
        report.packed_bytes,
        report.final_id
    ))
}

fn run_apply(
    base: Option<&Path>,
    patch: &Path,
    output: &Path,
    options: &Options,
    quiet: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let patch = Patch::open(patch)?;
    let base = open(base)?;
    let made = {
        let bar = Bar::new(quiet || as_json, "applying");
        apply(&patch, base.as_ref(), output, options, &|done, total| bar.report(done, total))?
    };
    let bytes = patch.manifest().total_bytes();
    if as_json {
        return print_json(&json!({ "final_id": made.to_string(), "raw_bytes": bytes }));
    }
    if quiet { Ok(()) } else { print(&format!("{}: state {made}, {bytes} bytes", output.display())) }
}

fn run_verify(
    patch: &Path,
    base: Option<&Path>,
    options: &Options,
    quiet: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let opened = Patch::open(patch)?;
    let base = open(base)?;
    let found = {
        let bar = Bar::new(quiet || as_json, "verifying");
        verify(&opened, base.as_ref(), options, &|done, total| bar.report(done, total))?
    };
    if as_json {
        return print_json(&json!({
            "patch_bytes": found.patch_bytes, "decoded": found.decoded,
            "final_id": opened.final_id().to_string(),
        }));
    }
    let reach = if found.decoded {
        "decodes to the state it promises"
    } else {
        "its bytes are intact (give --base to decode it as well)"
    };
    if quiet { Ok(()) } else { print(&format!("{}: {reach}", patch.display())) }
}

fn run_inspect(patch: &Path, options: &Options, as_json: bool) -> Result<(), Failure> {
    let patch = Patch::open(patch)?;
    let found = inspect(&patch, options)?;
    if as_json { print_json(&found.to_json(&patch)) } else { print(&inspection_text(&patch, &found)) }
}

fn inspection_text(patch: &Patch<'_>, found: &Inspection) -> String {
    let heading = ["tensor", "dtype", "shape", "raw", "packed", "ratio", "changed", "modes"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for tensor in &found.tensors {
        let used = overspill_tpde::mode_names().zip(tensor.modes).filter(|(_, count)| count.chunks > 0);
        let modes: Vec<String> = used.map(|(name, count)| format!("{name}:{}", count.chunks)).collect();
        let dims: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
        rows.push(vec![
            tensor.name.clone(),
            tensor.dtype.to_owned(),
            dims.join("x"),
            tensor.raw_bytes.to_string(),
            tensor.packed_bytes.to_string(),
            format!("{:.2}", tensor.ratio()),
            percent(tensor.changed_share),
            if modes.is_empty() { "unchanged".to_owned() } else { modes.join(" ") },
        ]);
    }
    let (raw, packed) = (found.raw_bytes.to_string(), found.packed_bytes.to_string());
    let total = ["total", "", "", &raw, &packed, &format!("{:.2}", found.ratio())].map(String::from);
    rows.push([total.to_vec(), vec![percent(found.changed_share)]].concat());
    let base = patch.kind().base().map_or_else(|| "nothing".to_owned(), |id| id.to_string());
    format!("{} patch from {base} to {}\n{}", patch.kind().name(), patch.final_id(), columns(&rows))
}

fn run_diff(a: &Path, b: &Path, options: &Options, quiet: bool, as_json: bool) -> Result<(), Failure> {
    let (a, b) = (Checkpoint::open(a)?, Checkpoint::open(b)?);
    let found = {
        let bar = Bar::new(quiet || as_json, "comparing");
        diff(&a, &b, options, &|done, total| bar.report(done, total))?
    };
    if as_json { print_json(&found.to_json()) } else { print(&diff_text(&found)) }
}

fn diff_text(found: &Diff) -> String {
    let mut rows =
        vec![["tensor", "change", "words", "share", "steps in ULPs: words"].map(String::from).to_vec()];
    for tensor in &found.tensors {
        rows.push([vec![tensor.name.clone()], tensor.change.cells()].concat());
    }
    format!("{}\n{} tensors differ, {} are the same", columns(&rows), found.tensors.len(), found.unchanged)
}
