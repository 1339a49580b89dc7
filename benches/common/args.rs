//! Arguments of a bench.
//!
//! Role: what may be set on the command line. Neighbours: all of a bench asks here. Invariants: what cargo adds is accepted and means nothing.

use super::{MIB, goals};
use clap::Parser;
use std::path::{Path, PathBuf};

/// Measures pageferry against baselines of the same run.
#[derive(Parser)]
#[command(version)]
pub struct Args {
    /// Less of everything: under 40 s on 2 cores, ratios as honest, quantiles coarser
    #[arg(long)]
    pub quick: bool,
    /// Write the results to this file as one flat JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure only keys that contain this, and their baselines
    #[arg(long, value_name = "KEY")]
    filter: Option<String>,
    /// Exit with 1 if a target is missed
    #[arg(long)]
    pub strict: bool,
    /// Added by cargo
    #[arg(long, hide = true)]
    bench: bool,
    /// This process is a far end
    #[arg(long, hide = true)]
    role: Option<String>,
}

impl Args {
    pub fn read() -> Args {
        Args::parse()
    }

    pub fn role(&self) -> Option<&str> {
        self.role.as_deref()
    }

    /// Whether a case with these keys is wanted: a key is, or a key is compared with one of these.
    pub fn wants(&self, keys: &[&str]) -> bool {
        let Some(filter) = self.filter.as_deref() else { return true };
        let compared = goals::GOALS.iter().filter(|goal| goal.key.contains(filter)).flat_map(|goal| goal.baseline.keys());
        keys.iter().any(|key| key.contains(filter)) || compared.into_iter().any(|key| keys.contains(key))
    }

    /// Bytes that a throughput case moves.
    pub fn bulk_bytes(&self) -> u64 {
        if self.quick { 256 * MIB } else { 1024 * MIB }
    }

    /// The JSON file, with its folder made.
    pub fn json_file(&self) -> std::io::Result<Option<&Path>> {
        if let Some(parent) = self.json.as_deref().and_then(Path::parent) {
            std::fs::create_dir_all(parent)?;
        }
        Ok(self.json.as_deref())
    }
}
