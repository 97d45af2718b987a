//! `run`: attention over the tensors of a file.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use mlx_flash_attn::attention::oracle::{Inputs, Values};
use mlx_flash_attn::attention::{Problem, QueryOffset, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, KernelRegistry, MlxBuffer, MlxDevice};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use crate::args::LayoutArg;
use crate::check::Verdict;
use crate::cli::RunArgs;
use crate::files::Target;
use crate::input::{Input, Tensor};
use crate::json::RunLine;
use crate::output::{Results, Status, message};
use crate::progress;
use crate::table::{Fields, milliseconds};

pub(crate) fn execute(args: &RunArgs, results: &mut Results) -> Result<Status> {
    let target = Target::new(&args.output, &[&args.input])?;
    let device = args.device.open()?;
    let job = Job::read(args, &device)?;

    let spinner = progress::spinner("computing".into(), args.json);
    let ms = job.compute(&device);
    spinner.finish_and_clear();
    let ms = ms?;
    target.write(&job.serialize()?)?;

    let verdict = args.check.then(|| job.check(args.json)).transpose()?;
    if args.json {
        results.json(&RunLine {
            device: device.kind().name(),
            ms,
            check: verdict.as_ref().map(Verdict::line),
        })?;
    } else {
        let mut fields = Fields::default();
        fields.add("device", device.name());
        job.summary.describe(&mut fields);
        fields.add("time", milliseconds(ms));
        fields.add("output", args.output.display());
        if let Some(verdict) = &verdict {
            verdict.describe(&mut fields);
        }
        results.text(&fields.to_string())?;
    }
    let status = verdict.map_or(Status::Done, |v| v.status());
    if status == Status::CheckFailed {
        message(format_args!("error: the result is over the tolerance"));
    }
    Ok(status)
}

/// A problem with its operands on a device.
struct Job {
    problem: Problem,
    q: MlxBuffer,
    k: MlxBuffer,
    v: MlxBuffer,
    out: MlxBuffer,
    mask: Option<MlxBuffer>,
    sinks: Option<MlxBuffer>,
    lse: Option<MlxBuffer>,
    summary: Summary,
}

impl Job {
    fn read(args: &RunArgs, device: &MlxDevice) -> Result<Self> {
        let path = &args.input;
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|e| anyhow::anyhow!("{}: not a safetensors file: {e}", path.display()))?;
        let at = || format!("{}", path.display());
        let input = Input::new(&tensors, args.layout).with_context(at)?;
        note_what_has_no_effect(args, &input, path);
        Self::new(args, &input, device).with_context(at)
    }

    fn new(args: &RunArgs, input: &Input<'_>, device: &MlxDevice) -> Result<Self> {
        let mut builder = Problem::builder(input.q.dtype, input.shape)
            .kv_dtype(input.k.dtype)
            .layout(args.layout.into())
            .causal(args.causal)
            .query_offset(args.q_offset)
            .sinks(input.sinks.is_some())
            .lse(args.lse);
        if let Some((_, spec)) = &input.mask {
            builder = builder.mask(*spec);
        }
        if let Some(window) = args.window {
            builder = builder.window(window);
        }
        if let Some(softcap) = args.softcap {
            builder = builder.softcap(softcap);
        }
        if let Some(scale) = args.scale {
            builder = builder.scale(scale);
        }
        let problem = builder.build()?;
        let upload = |tensor: &Tensor<'_>| upload(device, tensor);
        let zeros = |dtype: DType, shape: Vec<usize>| {
            let elements: usize = shape.iter().product();
            device.alloc_buffer(elements * dtype.size_of(), dtype, shape)
        };
        let Shape {
            batch,
            heads,
            query_len,
            ..
        } = input.shape;
        Ok(Self {
            problem,
            q: upload(&input.q)?,
            k: upload(&input.k)?,
            v: upload(&input.v)?,
            out: zeros(input.q.dtype, input.q.shape.clone())?,
            mask: input.mask.as_ref().map(|(t, _)| upload(t)).transpose()?,
            sinks: input.sinks.as_ref().map(upload).transpose()?,
            lse: args
                .lse
                .then(|| zeros(DType::F32, vec![batch, heads, query_len]))
                .transpose()?,
            summary: Summary::new(input, args.layout),
        })
    }

    /// Runs the problem once and gives the time it took on the device, in milliseconds.
    fn compute(&self, device: &MlxDevice) -> Result<f64> {
        let mut registry = KernelRegistry::new();
        let mut encoder = device.command_encoder()?;
        let operands = Operands {
            mask: self.mask.as_ref(),
            sinks: self.sinks.as_ref(),
            lse: self.lse.as_ref(),
            ..Operands::new(&self.q, &self.k, &self.v, &self.out)
        };
        ops::attention(
            &mut encoder,
            device,
            &mut registry,
            &self.problem,
            &operands,
        )?;
        let (start, end) = encoder.commit_wait_with_gpu_time()?;
        Ok((end - start) * 1e3)
    }

    fn serialize(&self) -> Result<Vec<u8>> {
        let dtype = match self.out.dtype() {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        };
        let mut tensors = vec![("o", view(dtype, &self.out)?)];
        if let Some(lse) = &self.lse {
            tensors.push(("lse", view(Dtype::F32, lse)?));
        }
        Ok(serialize(tensors, None)?)
    }

    fn check(&self, hidden: bool) -> Result<Verdict> {
        let mask = self.mask.as_ref().map(values).transpose()?;
        let sinks = self.sinks.as_ref().map(MlxBuffer::as_slice::<f32>);
        let lse = self.lse.as_ref().map(MlxBuffer::as_slice::<f32>);
        let inputs = Inputs {
            q: values(&self.q)?,
            k: values(&self.k)?,
            v: values(&self.v)?,
            mask,
            sinks: sinks.transpose()?,
            alibi_slopes: None,
        };
        let out = values(&self.out)?;
        Verdict::new(&self.problem, &inputs, &out, lse.transpose()?, hidden)
    }
}

fn view(dtype: Dtype, buffer: &MlxBuffer) -> Result<TensorView<'_>> {
    let bytes = buffer.as_slice::<u8>()?;
    Ok(TensorView::new(dtype, buffer.shape().to_vec(), bytes)?)
}

fn values(buffer: &MlxBuffer) -> Result<Values<'_>> {
    Ok(Values::from_bytes(
        buffer.dtype(),
        buffer.as_slice::<u8>()?,
    )?)
}

fn upload(device: &MlxDevice, tensor: &Tensor<'_>) -> mlx_flash_attn::Result<MlxBuffer> {
    let mut buffer = device.alloc_buffer(tensor.bytes.len(), tensor.dtype, tensor.shape.clone())?;
    // Bytes, as a file's tensors need not be aligned.
    buffer.as_mut_slice::<u8>()?.copy_from_slice(tensor.bytes);
    Ok(buffer)
}

/// What is computed, for people.
struct Summary {
    q: String,
    kv: String,
    mask: Option<String>,
    sinks: bool,
}

impl Summary {
    fn new(input: &Input<'_>, layout: LayoutArg) -> Self {
        let mask = input.mask.as_ref().map(|(mask, spec)| {
            let dtype = if spec.is_bool() {
                "bool"
            } else {
                mask.dtype.name()
            };
            format!("{dtype} {:?}", mask.shape)
        });
        Self {
            q: format!("{} {:?} {}", input.q.dtype, input.q.shape, layout.name()),
            kv: format!("{} {:?}", input.k.dtype, input.k.shape),
            mask,
            sinks: input.sinks.is_some(),
        }
    }

    fn describe(&self, fields: &mut Fields) {
        fields.add("q", &self.q);
        fields.add("k, v", &self.kv);
        if let Some(mask) = &self.mask {
            fields.add("mask", mask);
        }
        if self.sinks {
            fields.add("sinks", "one for each head");
        }
    }
}

fn note_what_has_no_effect(args: &RunArgs, input: &Input<'_>, path: &Path) {
    if !input.unused.is_empty() {
        let names: Vec<String> = input.unused.iter().map(|n| format!("`{n}`")).collect();
        message(format_args!(
            "note: {}: not used: {}",
            path.display(),
            names.join(", ")
        ));
    }
    let bounded = args.causal || args.window.is_some();
    if args.q_offset != QueryOffset::default() && !bounded {
        message(format_args!(
            "note: --q-offset has no effect without --causal or --window"
        ));
    }
}
