//! The table of what every kernel takes on every architecture, as it is kept in the repository.

use std::fmt::Write as _;

use super::Nvrtc;
use crate::{Result, kernels};

/// Compute capabilities that every kernel is compiled for: A100, the RTX 30s, the RTX 40s, H100 and
/// H200, B200, the RTX 50s.
pub const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// Compiles every kernel for every architecture; the table is Markdown.
pub fn markdown(nvrtc: &Nvrtc) -> Result<String> {
    let (major, minor) = nvrtc.version();
    let mut table = format!(
        "# Kernels\n\nRegisters a thread / static shared memory a block / stack a thread / spills a thread, the last \
         three in bytes,\nas NVRTC {major}.{minor} compiles them. Written by `cargo run -p overspill-device --example \
         kernel_table`.\n\n| file | kernel |"
    );
    for architecture in ARCHITECTURES {
        let _ = write!(table, " sm_{architecture} |");
    }
    let _ = writeln!(table, "\n|---|---|{}", "---|".repeat(ARCHITECTURES.len()));
    for source in kernels::ALL {
        let compiled = ARCHITECTURES
            .iter()
            .map(|&architecture| Ok(nvrtc.compile(source, architecture)?.usage))
            .collect::<Result<Vec<_>>>()?;
        for (row, first) in compiled[0].iter().enumerate() {
            let _ = write!(table, "| {} | `{}` |", source.name, first.kernel);
            for usage in &compiled {
                let kernel = usage.get(row).cloned().unwrap_or_default();
                let _ = write!(
                    table,
                    " {} / {} / {} / {} |",
                    kernel.registers, kernel.shared_bytes, kernel.stack_bytes, kernel.spill_bytes
                );
            }
            table.push('\n');
        }
    }
    Ok(table)
}
