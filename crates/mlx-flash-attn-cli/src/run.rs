//! `run`: attention over the tensors of a file.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mlx_flash_attn::attention::oracle::{Inputs, Values};
use mlx_flash_attn::attention::{Problem, ProblemBuilder, Role, Shape, Strides};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, MlxBuffer, MlxDevice};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use crate::args::LayoutArg;
use crate::check::Verdict;
use crate::cli::RunArgs;
use crate::files::Target;
use crate::input::Input;
use crate::json::RunLine;
use crate::output::{Results, Status, message};
use crate::packed::Packed;
use crate::progress;
use crate::score;
use crate::table::{Fields, milliseconds};
use crate::tensors::Tensor;

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

/// Where the rows of the operands lie, and how many keys each sequence has.
fn builder(args: &RunArgs, input: &Input<'_>) -> ProblemBuilder {
    let (dtype, shape, sequences) = (input.q.dtype, input.shape, &input.sequences);
    let Shape {
        heads,
        kv_heads,
        key_len,
        qk_dim: dim,
        ..
    } = shape;
    if let Some(Packed { queries, keys }) = &input.packed {
        return Problem::varlen(dtype, heads, kv_heads, dim, queries, keys);
    }
    let builder = match &sequences.queries {
        None => Problem::builder(dtype, shape),
        Some(queries) => {
            let rows = Strides {
                batch: 0,
                head: dim,
                seq: heads * dim,
            };
            Problem::varlen_queries(dtype, heads, kv_heads, key_len, dim, queries)
                .strides(Role::Query, rows)
                .strides(Role::Output, rows)
        }
    };
    let builder = match input.pages {
        None => builder.key_capacity(input.capacity),
        Some(pages) => builder.pages(pages),
    };
    builder
        .layout(args.layout.into())
        .key_lengths(sequences.key_lengths())
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
    alibi_slopes: Option<MlxBuffer>,
    block_table: Option<MlxBuffer>,
    lse: Option<MlxBuffer>,
    /// Query rows past the last boundary of packed sequences.
    padding: usize,
    summary: Summary,
}

impl Job {
    fn read(args: &RunArgs, device: &MlxDevice) -> Result<Self> {
        let path = &args.input;
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|e| anyhow::anyhow!("{}: not a safetensors file: {e}", path.display()))?;
        let at = || format!("{}", path.display());
        let input = Input::new(&tensors, args.layout, args.key_len).with_context(at)?;
        note_what_has_no_effect(args, &input, path);
        Self::new(args, &input, device).with_context(at)
    }

    fn new(args: &RunArgs, input: &Input<'_>, device: &MlxDevice) -> Result<Self> {
        let shape = input.shape;
        let builder = builder(args, input);
        let positions_count = args.score.bounded() || input.alibi_slopes.is_some();
        let offset = score::offset(args.q_offset, positions_count, input.lengths())?;
        let mut builder = args
            .score
            .apply(builder)
            .kv_dtype(input.k.dtype)
            .query_offset(offset)
            .sinks(input.sinks.is_some())
            .alibi(input.alibi_slopes.is_some())
            .lse(args.lse);
        if let Some((_, spec)) = &input.mask {
            builder = builder.mask(*spec);
        }
        let problem = builder.build()?;
        let upload = |tensor: &Tensor<'_>| upload(device, tensor);
        let Shape { batch, heads, .. } = shape;
        let rows = problem.query_rows();
        let lse_shape = match problem.cu_seqlens_q() {
            None => vec![batch, heads, rows],
            Some(_) => vec![heads, rows],
        };
        Ok(Self {
            padding: shape.query_len - rows,
            problem,
            q: upload(&input.q)?,
            k: upload(&input.k)?,
            v: upload(&input.v)?,
            out: zeros(device, input.q.dtype, input.q.shape.clone())?,
            mask: input.mask.as_ref().map(|(t, _)| upload(t)).transpose()?,
            sinks: input.sinks.as_ref().map(upload).transpose()?,
            alibi_slopes: input.alibi_slopes.as_ref().map(upload).transpose()?,
            block_table: input.sequences.table.as_ref().map(upload).transpose()?,
            lse: args
                .lse
                .then(|| zeros(device, DType::F32, lse_shape))
                .transpose()?,
            summary: Summary::new(input, args.layout),
        })
    }

    /// Runs the problem once and gives the time it took on the device, in milliseconds.
    fn compute(&self, device: &MlxDevice) -> Result<f64> {
        let mut encoder = device.command_encoder()?;
        let operands = Operands {
            mask: self.mask.as_ref(),
            sinks: self.sinks.as_ref(),
            alibi_slopes: self.alibi_slopes.as_ref(),
            block_table: self.block_table.as_ref(),
            lse: self.lse.as_ref(),
            ..Operands::new(&self.q, &self.k, &self.v, &self.out)
        };
        ops::attention(&mut encoder, &self.problem, &operands)?;
        let (start, end) = encoder.commit_wait_with_gpu_time()?;
        Ok((end - start) * 1e3)
    }

    fn serialize(&self) -> Result<Vec<u8>> {
        let dtype = match self.out.dtype() {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        };
        let out = TensorView::new(dtype, self.out.shape().to_vec(), bytes(&self.out)?)?;
        let mut tensors = vec![("o", out)];
        let lse = self.lse.as_ref().map(|lse| self.padded(lse)).transpose()?;
        if let Some((shape, bytes)) = &lse {
            let lse = TensorView::new(Dtype::F32, shape.clone(), bytes)?;
            tensors.push(("lse", lse));
        }
        Ok(serialize(tensors, None)?)
    }

    /// Shape and bytes of the log-sum-exp, with `-inf` for the rows of padding.
    fn padded(&self, lse: &MlxBuffer) -> Result<(Vec<usize>, Vec<u8>)> {
        let Some((rows, outer)) = lse.shape().split_last() else {
            bail!("lse: expected rows, found a scalar")
        };
        let row_bytes = rows * size_of::<f32>();
        let hidden = f32::NEG_INFINITY.to_le_bytes().repeat(self.padding);
        let stored = bytes(lse)?;
        let mut padded = Vec::new();
        for head in 0..outer.iter().product() {
            padded.extend_from_slice(&stored[head * row_bytes..][..row_bytes]);
            padded.extend_from_slice(&hidden);
        }
        let shape = [outer, &[rows + self.padding]].concat();
        Ok((shape, padded))
    }

    fn check(&self, hidden: bool) -> Result<Verdict> {
        let mask = self.mask.as_ref().map(values).transpose()?;
        let sinks = self.sinks.as_ref().map(MlxBuffer::as_slice::<f32>);
        let slopes = self.alibi_slopes.as_ref().map(MlxBuffer::as_slice::<f32>);
        let table = self.block_table.as_ref().map(integers).transpose()?;
        let lse = self.lse.as_ref().map(floats).transpose()?;
        let inputs = Inputs {
            mask,
            sinks: sinks.transpose()?,
            alibi_slopes: slopes.transpose()?,
            block_table: table,
            ..Inputs::new(values(&self.q)?, values(&self.k)?, values(&self.v)?)
        };
        let out = values(&self.out)?;
        Verdict::new(&self.problem, &inputs, &out, lse, hidden)
    }
}

/// Memory for elements of a shape; for none of them too, which a device does not allocate.
fn zeros(device: &MlxDevice, dtype: DType, shape: Vec<usize>) -> mlx_flash_attn::Result<MlxBuffer> {
    let bytes = elements(&shape).saturating_mul(dtype.size_of());
    device.alloc_buffer(bytes.max(dtype.size_of()), dtype, shape)
}

fn upload(device: &MlxDevice, tensor: &Tensor<'_>) -> mlx_flash_attn::Result<MlxBuffer> {
    let mut buffer = zeros(device, tensor.dtype, tensor.shape.clone())?;
    // Bytes, as a file's tensors need not be aligned.
    buffer.as_mut_slice::<u8>()?[..tensor.bytes.len()].copy_from_slice(tensor.bytes);
    Ok(buffer)
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().copied().fold(1, usize::saturating_mul)
}

/// The bytes of a buffer's elements.
fn bytes(buffer: &MlxBuffer) -> Result<&[u8]> {
    let len = elements(buffer.shape()) * buffer.dtype().size_of();
    Ok(&buffer.as_slice::<u8>()?[..len])
}

fn floats(buffer: &MlxBuffer) -> Result<&[f32]> {
    Ok(&buffer.as_slice::<f32>()?[..elements(buffer.shape())])
}

fn integers(buffer: &MlxBuffer) -> Result<&[i32]> {
    Ok(&buffer.as_slice::<i32>()?[..elements(buffer.shape())])
}

fn values(buffer: &MlxBuffer) -> Result<Values<'_>> {
    Ok(Values::from_bytes(buffer.dtype(), bytes(buffer)?)?)
}

/// What is computed, for people.
struct Summary(Vec<(&'static str, String)>);

impl Summary {
    fn new(input: &Input<'_>, layout: LayoutArg) -> Self {
        let (q, k) = (&input.q, &input.k);
        let sequences = &input.sequences;
        let packed = input.packed.as_ref().map(|packed| &packed.queries);
        let order = match packed.or(sequences.queries.as_ref()) {
            None => layout.name().to_owned(),
            Some(_) => format!("{} packed sequences", input.lengths().len()),
        };
        let mut keys = format!("{} {:?}", k.dtype, k.shape);
        if let Some(pages) = input.pages {
            keys.push_str(&format!(" {}, pages of {}", layout.name(), pages.page_size));
        } else if input.shape.key_len < input.capacity {
            keys.push_str(&format!(", {} of the rows are keys", input.shape.key_len));
        }
        let mut fields = vec![
            ("q", format!("{} {:?} {order}", q.dtype, q.shape)),
            ("k, v", keys),
        ];
        if let Some(table) = &sequences.table {
            fields.push(("block table", format!("{:?}", table.shape)));
        }
        if let Some(lengths) = &sequences.keys {
            let [least, most] = [lengths.iter().min(), lengths.iter().max()];
            let range = least
                .zip(most)
                .map(|(least, most)| format!("{least} to {most}"));
            fields.push(("key lengths", range.unwrap_or_default()));
        }
        if let Some((mask, spec)) = &input.mask {
            let dtype = if spec.is_bool() {
                "bool"
            } else {
                mask.dtype.name()
            };
            fields.push(("mask", format!("{dtype} {:?}", mask.shape)));
        }
        let per_head = [
            ("sinks", &input.sinks),
            ("alibi slopes", &input.alibi_slopes),
        ];
        for (name, _) in per_head.into_iter().filter(|(_, x)| x.is_some()) {
            fields.push((name, "one for each head".into()));
        }
        Self(fields)
    }

    fn describe(&self, fields: &mut Fields) {
        for (name, value) in &self.0 {
            fields.add(name, value);
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
    let positions_count = args.score.bounded() || input.alibi_slopes.is_some();
    if args.q_offset.is_some() && !positions_count {
        message(format_args!(
            "note: --q-offset has no effect without a bound or ALiBi slopes"
        ));
    }
}
