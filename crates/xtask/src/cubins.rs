//! `cargo xtask cubins ARCH..`: every CUDA kernel, compiled without a GPU, and what the compiler said
//! held against what it must not say.

use mlx_flash_attn::cuda::{Image, compile_images};

/// What a kernel takes of the GPU, as the compiler reports it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Resources {
    registers: u64,
    stack: u64,
    spills: u64,
    /// Lines that stand for a kernel that is slower than its text says.
    complaints: Vec<String>,
}

/// Compiles for each architecture, prints a line a kernel, and fails if one is not as it must be.
pub(crate) fn run(archs: &[&str]) -> Result<(), String> {
    let mut faults = Vec::new();
    for arch in archs {
        let images = compile_images(arch, |_| true, |_, _| ()).map_err(|e| e.to_string())?;
        if images.is_empty() {
            return Err("there is no kernel to compile".into());
        }
        for image in &images {
            let resources = read(image)?;
            println!(
                "{arch} {:>3} registers, {} bytes of stack, {} spilled, {:>6} bytes: {}",
                resources.registers,
                resources.stack,
                resources.spills,
                image.cubin.len(),
                image.name
            );
            faults.extend(
                resources
                    .faults()
                    .into_iter()
                    .map(|fault| format!("{arch} {}: {fault}", image.name)),
            );
        }
        println!("{arch}: {} kernels", images.len());
    }
    if faults.is_empty() {
        return Ok(());
    }
    Err(format!("{} faults:\n{}", faults.len(), faults.join("\n")))
}

/// The compiler's report. A log without one is an error: nothing would be checked then.
fn read(image: &Image) -> Result<Resources, String> {
    let resources = parse(&image.log);
    if resources.registers == 0 {
        return Err(format!(
            "{}: the compiler's log has no report of its resources:\n{}",
            image.name, image.log
        ));
    }
    Ok(resources)
}

fn parse(log: &str) -> Resources {
    let mut all = Resources::default();
    // A module of several kernels has a report for each; the worst of each figure counts.
    for line in log.lines() {
        let number_before = |what: &str| {
            line.split(',').find_map(|part| {
                let number = part.split_once(what)?.0.split_whitespace().next_back()?;
                number.parse::<u64>().ok()
            })
        };
        all.registers = all.registers.max(number_before(" registers").unwrap_or(0));
        all.stack = all
            .stack
            .max(number_before(" bytes stack frame").unwrap_or(0));
        for what in [" bytes spill stores", " bytes spill loads"] {
            all.spills = all.spills.max(number_before(what).unwrap_or(0));
        }
        let lower = line.to_lowercase();
        let complaint = [
            "serialized",
            "setmaxnreg",
            "c7508",
            "c7510",
            "c7513",
            "warning",
        ];
        if complaint.iter().any(|word| lower.contains(word)) {
            all.complaints.push(line.trim().into());
        }
    }
    all
}

impl Resources {
    fn faults(&self) -> Vec<String> {
        let mut faults = self.complaints.clone();
        if self.stack > 0 || self.spills > 0 {
            faults.push(format!(
                "{} bytes of stack and {} bytes spilled: expected none",
                self.stack, self.spills
            ));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    const REPORT: &str = "ptxas info    : Compiling entry function 'attention' for 'sm_80'\n\
        ptxas info    : Function properties for attention\n\
        \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 213 registers, used 1 barriers, 680 bytes cmem[0]";

    #[test]
    fn a_clean_report_has_no_fault() {
        let resources = parse(REPORT);
        assert_eq!((resources.registers, resources.stack), (213, 0));
        assert!(resources.faults().is_empty());
    }

    #[test]
    fn spills_stack_and_complaints_are_faults() {
        for (from, to) in [
            ("0 bytes stack", "24 bytes stack"),
            ("0 bytes spill stores", "8 bytes spill stores"),
            ("0 bytes spill loads", "8 bytes spill loads"),
        ] {
            let log = REPORT.replace(from, to);
            assert_ne!(log, REPORT);
            assert_eq!(parse(&log).faults().len(), 1, "{log}");
        }
        for line in [
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
            "ptxas info    : (C7508) 'setmaxnreg' ignored to maintain minimum register requirement",
            "ptxas warning : something",
        ] {
            assert_eq!(parse(&format!("{REPORT}\n{line}")).faults().len(), 1);
        }
        assert_eq!(parse("").registers, 0);
    }
}
