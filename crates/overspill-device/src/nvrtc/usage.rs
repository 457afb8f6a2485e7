//! What the assembler's report says of each kernel.

/// What one kernel takes of a multiprocessor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelUsage {
    /// Name of the kernel.
    pub kernel: String,
    /// Registers a thread.
    pub registers: u32,
    /// Static shared memory a block, in bytes.
    pub shared_bytes: u32,
    /// Local memory a thread, in bytes.
    pub stack_bytes: u32,
    /// Registers written to and read from local memory, in bytes a thread.
    pub spill_bytes: u32,
}

/// Reads the report of `ptxas -v`; lines that it does not know are skipped.
pub fn parse(log: &str) -> Vec<KernelUsage> {
    let mut kernels: Vec<KernelUsage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(KernelUsage { kernel, ..KernelUsage::default() });
        }
        let Some(last) = kernels.last_mut() else { continue };
        if line.contains("stack frame") {
            last.stack_bytes = before(line, " bytes stack frame");
            last.spill_bytes = before(line, " bytes spill stores") + before(line, " bytes spill loads");
        } else if line.contains("Used ") {
            last.registers = before(line, " registers");
            last.shared_bytes = before(line, " bytes smem");
        }
    }
    kernels.sort_by(|left, right| left.kernel.cmp(&right.kernel));
    kernels
}

/// The number that stands right before `unit`, 0 if there is none.
fn before(line: &str, unit: &str) -> u32 {
    let Some((head, _)) = line.split_once(unit) else { return 0 };
    head.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_registers_shared_memory_stack_and_spills() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'wide' for 'sm_90'\n\
            ptxas info    : Function properties for wide\n\
            ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 1 barriers, 128 bytes smem, 369 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'bare' for 'sm_90'\n\
            ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 8 registers, used 0 barriers\n";
        let wide = KernelUsage {
            kernel: "wide".to_owned(),
            registers: 168,
            shared_bytes: 128,
            stack_bytes: 16,
            spill_bytes: 12,
        };
        let bare = KernelUsage { kernel: "bare".to_owned(), registers: 8, ..KernelUsage::default() };
        assert_eq!(parse(log), [bare, wide]);
        assert_eq!(parse("nothing of the kind"), []);
    }
}
