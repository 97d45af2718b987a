//! What a kernel takes of the GPU, from the compiler's report.

/// What a kernel takes of the GPU, as the compiler reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    pub(crate) registers: u64,
    pub(crate) stack: u64,
    pub(crate) spills: u64,
    /// Lines that stand for a kernel that is slower than its text says.
    pub(crate) complaints: Vec<String>,
}

/// By so many registers one text may differ from itself.
const FEW: u64 = 8;

/// Of every GPU from compute capability 8.0 to 9.0.
const PROCESSOR_REGISTERS: u64 = 65_536;

impl Resources {
    /// Reads a log. One without a report is an error: nothing would be checked then.
    pub(crate) fn read(log: &str) -> Result<Self, String> {
        let resources = parse(log);
        if resources.registers == 0 {
            return Err(format!(
                "the compiler's log has no report of its resources (one from NVRTC's own cache has none: \
                 set CUDA_CACHE_DISABLE=1):\n{log}"
            ));
        }
        Ok(resources)
    }

    /// What the kernel must not be. One that may spill is none the worse for it.
    pub(crate) fn faults(&self, may_spill: bool) -> Vec<String> {
        let mut faults = self.complaints.clone();
        if !may_spill && (self.stack > 0 || self.spills > 0) {
            faults.push(format!(
                "{} bytes of stack and {} bytes spilled: expected none",
                self.stack, self.spills
            ));
        }
        faults
    }

    /// Whether both stand for the same figures; complaints are compared by whether there are any. How many
    /// registers one text takes depends on what the compiler's process compiled before it: counts are the
    /// same where they are a few apart, or where a processor holds as many warps with either; and so are the bytes
    /// that a few registers take, in a kernel that may spill.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let registers = self.registers.abs_diff(other.registers) <= FEW;
        let bytes = |a: u64, b: u64| a.abs_diff(b) <= 4 * FEW;
        (registers || self.warps() == other.warps())
            && bytes(self.stack, other.stack)
            && bytes(self.spills, other.spills)
            && self.complaints.is_empty() == other.complaints.is_empty()
    }

    /// Warps for which a processor has registers, which it gives out in eights to each of 32 threads.
    fn warps(&self) -> u64 {
        PROCESSOR_REGISTERS / (32 * self.registers.next_multiple_of(8).max(8))
    }
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

#[cfg(test)]
mod tests {
    use super::{Resources, parse};

    const REPORT: &str = "ptxas info    : Compiling entry function 'attention' for 'sm_80'\n\
        ptxas info    : Function properties for attention\n\
        \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 213 registers, used 1 barriers, 680 bytes cmem[0]";

    #[test]
    fn a_clean_report_has_no_fault() {
        let resources = parse(REPORT);
        assert_eq!((resources.registers, resources.stack), (213, 0));
        assert!(resources.faults(false).is_empty());
    }

    #[test]
    fn registers_differ_where_a_processor_holds_other_warps() {
        let with = |registers| Resources {
            registers,
            ..Resources::default()
        };
        let same = |a, b| with(a).same(&with(b));
        assert!(same(166, 170) && same(184, 192));
        // Eight warps fit with either; with 200 registers ten.
        assert!(same(245, 255) && same(255, 245));
        assert!(!same(200, 255) && !same(112, 128));
        let spilled = |spills| Resources {
            spills,
            ..with(245)
        };
        assert!(spilled(100).same(&spilled(120)) && !spilled(100).same(&with(245)));
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
            assert_eq!(parse(&log).faults(false).len(), 1, "{log}");
            assert!(parse(&log).faults(true).is_empty(), "{log}");
        }
        for line in [
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
            "ptxas info    : (C7508) 'setmaxnreg' ignored to maintain minimum register requirement",
            "ptxas warning : something",
        ] {
            assert_eq!(parse(&format!("{REPORT}\n{line}")).faults(true).len(), 1);
        }
        assert!(Resources::read("").is_err());
    }
}
