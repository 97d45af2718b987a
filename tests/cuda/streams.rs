//! An engine's own memory and stream, and the order of kernels on streams.

use std::ffi::c_void;

use cudarc::driver::result;
use mlx_flash_attn::MlxBuffer;
use mlx_flash_attn::ops::Operands;

use crate::common::{Qkv, attend, bytes, output, shape, to_bytes};
use crate::{BF16, cuda, record};

#[test]
fn a_callers_stream_and_memory_give_the_same_bits() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(5, BF16, shape([2, 4, 2], (100, 130), 128));
    let problem = data.builder().causal(true).build().unwrap();
    let (want, _) = data.run(&device, &problem);

    // SAFETY: the device is open, so the driver is there; the context is the primary one.
    let (context, stream) = unsafe {
        let gpu = result::device::get(0).unwrap();
        let context = result::primary_ctx::retain(gpu).unwrap();
        result::ctx::set_current(context).unwrap();
        (
            context,
            result::stream::create(result::stream::StreamKind::NonBlocking).unwrap(),
        )
    };
    assert!(!context.is_null());
    let mut own = Vec::new();
    let mut wrap = |values: &[f32]| {
        let host = to_bytes(values, BF16);
        // SAFETY: freed below, after the last use; the copy has as many bytes.
        unsafe {
            let at = result::malloc_sync(host.len()).unwrap();
            result::memcpy_htod_sync(at, &host).unwrap();
            own.push(at);
            device
                .cuda_wrap(at, host.len(), BF16, vec![values.len()])
                .unwrap()
        }
    };
    let out = vec![f32::NAN; data.q.len()];
    let buffers = [wrap(&data.q), wrap(&data.k), wrap(&data.v), wrap(&out)];
    // A copy of pageable memory may still be under way when it returns, and a stream that does not
    // block does not wait for it.
    result::ctx::synchronize().unwrap();
    let mut encoder = device.command_encoder().unwrap();
    for raw in [stream.cast::<c_void>(), std::ptr::null_mut()] {
        record(&mut encoder, &problem, &buffers);
        // SAFETY: the stream is the primary context's, and destroyed below.
        let in_flight = unsafe { encoder.encode_into_stream(raw) }.unwrap();
        assert!(buffers[3].as_slice::<u8>().is_err(), "it has not finished");
        in_flight.wait().unwrap();
        drop(in_flight);
        assert_eq!(bytes(&buffers[3]), want);
    }
    // What others write to the caller's memory is seen.
    // SAFETY: the memory has as many bytes; nothing runs.
    unsafe { result::memset_d8_sync(own[3], 0, want.len()).unwrap() };
    assert!(bytes(&buffers[3]).iter().all(|x| *x == 0));
    // Commands of the device's own come after those on the stream, and the other way round.
    record(&mut encoder, &problem, &buffers);
    // SAFETY: as above.
    let in_flight = unsafe { encoder.encode_into_stream(stream.cast()) }.unwrap();
    let second = output(&device, data.q.len(), BF16);
    let [_, k, v, out] = buffers.clone();
    record(&mut encoder, &problem, &[out, k, v, second.clone()]);
    encoder.commit_and_wait().unwrap();
    drop(in_flight);
    let [_, k, v, out] = &buffers;
    let third = output(&device, data.q.len(), BF16);
    attend(&device, &problem, &Operands::new(out, k, v, &third));
    assert_eq!(bytes(&second), bytes(&third));

    drop(buffers);
    // SAFETY: made above, used no more.
    unsafe {
        result::stream::destroy(stream).unwrap();
        own.into_iter()
            .for_each(|at| result::free_sync(at).unwrap());
        result::primary_ctx::release(result::device::get(0).unwrap()).unwrap();
    }
}

/// The streams of a chain's links: the device's own or one of two callers'.
const TURNS: [[Option<usize>; 6]; 3] = [
    [Some(0); 6],
    [Some(0), None, Some(0), None, Some(0), None],
    [None, Some(0), Some(1), Some(1), Some(0), None],
];

/// Hopper kernels start under the one before them: none may read what that has not written yet, on one
/// stream or across several, whatever else keeps the GPU busy.
#[test]
fn kernels_in_a_chain_wait_for_each_other() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(15, BF16, shape([1, 8, 8], (700, 700), 128));
    let problem = data.builder().causal(true).build().unwrap();
    let [first, k, v, _] = data.buffers(&device);
    let [other, ..] = Qkv::new(17, BF16, data.shape).buffers(&device);
    // By turns, so that what the round before left is not what this one makes.
    let queries = [first, other];
    let chain = TURNS[0].map(|_| output(&device, data.q.len(), BF16));
    let link = |round: usize, i: usize| {
        let query = if i == 0 {
            &queries[round % 2]
        } else {
            &chain[i - 1]
        };
        [query.clone(), k.clone(), v.clone(), chain[i].clone()]
    };
    let mut encoder = device.command_encoder().unwrap();
    let want = [0, 1].map(|round| {
        let links = chain.iter().enumerate().map(|(i, out)| {
            record(&mut encoder, &problem, &link(round, i));
            encoder.commit_and_wait().unwrap();
            bytes(out)
        });
        links.collect::<Vec<_>>()
    });
    assert_ne!(want[0], want[1]);
    let streams =
        [0, 1].map(|_| result::stream::create(result::stream::StreamKind::NonBlocking).unwrap());
    let busy = std::sync::atomic::AtomicBool::new(true);
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let device = cuda().unwrap();
            let data = Qkv::new(16, BF16, shape([1, 4, 4], (2048, 2048), 64));
            let problem = data.builder().build().unwrap();
            while busy.load(std::sync::atomic::Ordering::Relaxed) {
                data.run(&device, &problem);
            }
        });
        for round in 0..60 {
            let mut in_flight = Vec::new();
            // In the first of four rounds all in one command.
            let turns = (round % 4 > 0).then(|| TURNS[round % 4 - 1]);
            for i in 0..chain.len() {
                record(&mut encoder, &problem, &link(round, i));
                let on = match turns {
                    None if i + 1 < chain.len() => continue,
                    None => None,
                    Some(turns) => turns[i],
                };
                match on {
                    Some(on) => {
                        // SAFETY: the stream is the primary context's, and destroyed below.
                        let command = unsafe { encoder.encode_into_stream(streams[on].cast()) };
                        in_flight.push(command.unwrap());
                    }
                    None => {
                        encoder.commit();
                    }
                }
            }
            drop(in_flight);
            encoder.wait_until_completed().unwrap();
            for (i, out) in chain.iter().enumerate() {
                if bytes(out) != want[round % 2][i] {
                    wrong.push((round, i));
                }
            }
        }
        busy.store(false, std::sync::atomic::Ordering::Relaxed);
    });
    for stream in streams {
        // SAFETY: made above, used no more.
        unsafe { result::stream::destroy(stream).unwrap() };
    }
    assert!(wrong.is_empty(), "rounds and links: {wrong:?}");
}

/// What the host wrote counts as uploaded from the moment that a command on a caller's stream carries
/// it, and another thread's command on the device's own stream must not run before that upload has.
#[test]
fn an_upload_on_a_callers_stream_is_waited_for_by_commands_of_other_threads() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(18, BF16, shape([1, 2, 2], (64, 64), 64));
    let problem = data.builder().build().unwrap();
    let (want, _) = data.run(&device, &problem);
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    // Keeps the caller's stream busy, so that what is put on it runs late.
    let busy_bytes = 1 << 30;
    // SAFETY: freed below, after the last use.
    let busy = unsafe { result::malloc_sync(busy_bytes) }.unwrap();
    let mut wrong = 0;
    for _ in 0..300 {
        let [q, k, v, theirs] = data.buffers(&device);
        let ours: Vec<MlxBuffer> = (0..4)
            .map(|_| output(&device, data.q.len(), BF16))
            .collect();
        // SAFETY: as many bytes, on a stream of this context.
        unsafe { result::memset_d8_async(busy, 0, busy_bytes, stream) }.unwrap();
        let raw = stream as usize;
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut encoder = device.command_encoder().unwrap();
                let buffers = [q.clone(), k.clone(), v.clone(), theirs.clone()];
                record(&mut encoder, &problem, &buffers);
                start.wait();
                // SAFETY: the stream is the primary context's, and destroyed below.
                let in_flight = unsafe { encoder.encode_into_stream(raw as *mut c_void) };
                in_flight.unwrap().wait().unwrap();
            });
            let mut encoders: Vec<_> = ours
                .iter()
                .map(|out| {
                    let mut encoder = device.command_encoder().unwrap();
                    let buffers = [q.clone(), k.clone(), v.clone(), out.clone()];
                    record(&mut encoder, &problem, &buffers);
                    encoder
                })
                .collect();
            start.wait();
            for encoder in &mut encoders {
                encoder.commit();
            }
        });
        wrong += ours.iter().filter(|out| bytes(out) != want).count();
    }
    // SAFETY: made above, used no more.
    unsafe {
        result::stream::destroy(stream).unwrap();
        result::free_sync(busy).unwrap();
    }
    assert_eq!(wrong, 0, "outputs from operands that were not there yet");
}
