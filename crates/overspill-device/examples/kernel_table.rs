//! Prints the table of registers, shared memory, stack and spills that `docs/kernels.md` holds.
//!
//! Needs NVRTC, no GPU: `OVERSPILL_NVRTC_DIR=... cargo run -p overspill-device --example kernel_table`.

use overspill_device::{Result, nvrtc};

fn main() -> Result<()> {
    print!("{}", nvrtc::table::markdown(&nvrtc::Nvrtc::find(None)?)?);
    Ok(())
}
