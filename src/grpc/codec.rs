//! Messages on the wire: tonic's own way, with buffers of a decision's size. Its own are of 8 KiB each way, which cost 2,100 of a call's 64,600
//! instructions (docs/performance.md).

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{self, BufferSettings};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// A decision fits, asked and answered, and a buffer grows for what does not. tonic's are eight times as long, which the allocator
/// does not keep.
const BUFFER_BYTES: usize = 1024;
/// What may be ready of an answer before it is sent: tonic's own measure.
const SEND_BYTES: usize = 32 * 1024;

/// What the generated code encodes and decodes by.
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
