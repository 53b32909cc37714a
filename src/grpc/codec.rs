//! Encodes and decodes messages as tonic does, but with smaller buffers. tonic's buffers of 8 KiB in each direction cost 2,100 of a call's 64,600
//! instructions (docs/performance.md).

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{self, BufferSettings};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Large enough for a decision's request and answer; a buffer grows for larger ones. tonic's default is eight times as long, and the allocator does
/// not keep buffers of that size.
const BUFFER_BYTES: usize = 1024;
/// How much encoded data may be collected before it is sent. tonic's default.
const SEND_BYTES: usize = 32 * 1024;

/// The codec that the generated code uses.
#[derive(Debug, Clone)]
pub(super) struct Codec<T, U>(PhantomData<(T, U)>);

// === impl Codec ===

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(BUFFER_BYTES, SEND_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(BUFFER_BYTES, SEND_BYTES))
    }
}
