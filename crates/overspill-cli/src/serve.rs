//! `overspill serve`: its options. What runs the model is not here.

use std::{net::SocketAddr, path::PathBuf};

use serde_json::json;

use crate::Failure;

/// Serves a model: OpenAI's routes, and sessions that pause, leave the device and come back exact.
///
/// Without a model it serves SmolLM2-135M. API keys are one a line in the file of --api-keys, or in
/// OVERSPILL_API_KEYS with commas between; without any, it listens on loopback only.
///
/// Examples:
///   overspill serve
///   overspill serve ./llama-8b --vram-budget 24GiB --host-budget 64GiB --spill-dir /scratch --state-dir ./sessions
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder of a causal language model of transformers, with its tokenizer.
    model: Option<PathBuf>,
    /// All that may be held on the device; default: what is free.
    #[arg(long)]
    vram_budget: Option<String>,
    /// Most host memory for sessions that are away.
    #[arg(long, default_value = "1GiB")]
    host_budget: String,
    /// Where sessions go when host memory is full.
    #[arg(long)]
    spill_dir: Option<PathBuf>,
    /// Most bytes there, which have to be free at the start.
    #[arg(long, default_value = "16GiB")]
    spill_limit: String,
    /// Address and port.
    #[arg(long, default_value = "127.0.0.1:8321")]
    bind: SocketAddr,
    /// Where sessions are saved when the server ends, and taken up from when it starts; default: they end with it.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// Tokens of the longest session.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=16_777_216))]
    session_tokens: Option<u64>,
    /// Bytes for sessions on the device, instead of what --vram-budget leaves.
    #[arg(long)]
    arena_budget: Option<String>,
    /// bfloat16, float16 or float32; default: float32 without a GPU, else the model's own.
    #[arg(long, value_parser = ["bfloat16", "float16", "float32"])]
    dtype: Option<String>,
    /// The name under which the model is served; default: that of its folder.
    #[arg(long)]
    name: Option<String>,
    /// File of API keys, one a line; lines that start with # are comments.
    #[arg(long)]
    api_keys: Option<PathBuf>,
    /// A limit as NAME=NUMBER, such as max_tokens=1024; docs/server.md lists them.
    #[arg(long = "limit", value_name = "NAME=NUMBER")]
    limits: Vec<String>,
}

impl Args {
    /// As JSON.
    pub fn to_json(&self) -> Result<String, Failure> {
        let mut limits = serde_json::Map::new();
        for limit in &self.limits {
            let parsed = limit.split_once('=').and_then(|(name, number)| {
                Some((name.to_owned(), serde_json::from_str::<serde_json::Number>(number).ok()?.into()))
            });
            let (name, number) =
                parsed.ok_or_else(|| Failure::Misuse(format!("--limit {limit}: expected NAME=NUMBER")))?;
            limits.insert(name, number);
        }
        Ok(json!({
            "model": self.model,
            "vram_budget": self.vram_budget,
            "host_budget": self.host_budget,
            "spill_dir": self.spill_dir,
            "spill_limit": self.spill_limit,
            "bind": self.bind.to_string(),
            "state_dir": self.state_dir,
            "session_tokens": self.session_tokens,
            "arena_budget": self.arena_budget,
            "dtype": self.dtype,
            "name": self.name,
            "api_keys": self.api_keys,
            "limits": limits,
        })
        .to_string())
    }
}
