//! H.264 out of RTP, a whole picture at a time.
//!
//! `decodebin3` starts a depayloader before it knows what comes next, and one that is asked by nobody
//! hands out single NAL units. Pictures then come as late as the one after them (from the picture to the
//! subscriber: 95 ms instead of 28, at 15 frames a second), and the parser makes several of a picture
//! where a sender repeats its parameter sets between slices. Asked for whole pictures, the depayloader
//! puts them together itself, by the marker of RTP. This bin asks, and outranks the bare one. (H.265's
//! loses the sender's clock when it is asked.)

use std::sync::LazyLock;

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;

glib::wrapper! {
    pub struct H264Depay(ObjectSubclass<imp::H264Depay>)
        @extends gst::Bin, gst::Element, gst::Object, @implements gst::ChildProxy;
}

/// Makes it known to `decodebin3`.
pub(super) fn register() -> Result<(), glib::BoolError> {
    let rank = gst::Rank::PRIMARY + 100;
    gst::Element::register(None, "noblinkh264depay", rank, H264Depay::static_type())
}

mod imp {
    use super::*;

    #[derive(Debug, Default)]
    pub struct H264Depay;

    static TEMPLATES: LazyLock<[gst::PadTemplate; 2]> = LazyLock::new(|| {
        let rtp = gst::Caps::builder("application/x-rtp")
            .field("media", "video")
            .field("clock-rate", 90_000)
            .field("encoding-name", "H264");
        // As `avc` the parameter sets are no part of the pictures.
        let whole = gst::Caps::builder("video/x-h264")
            .field("stream-format", "avc")
            .field("alignment", "au");
        let always = |name, direction, caps: gst::Caps| {
            gst::PadTemplate::new(name, direction, gst::PadPresence::Always, &caps)
                .expect("its name is plain")
        };
        [
            always("sink", gst::PadDirection::Sink, rtp.build()),
            always("src", gst::PadDirection::Src, whole.build()),
        ]
    });

    #[glib::object_subclass]
    impl ObjectSubclass for H264Depay {
        const NAME: &'static str = "NoblinkH264Depay";
        type Type = super::H264Depay;
        type ParentType = gst::Bin;
    }

    impl H264Depay {
        fn fill(&self) -> Result<(), glib::BoolError> {
            let bin = self.obj();
            let [sink, src] = &*TEMPLATES;
            let depay = gst::ElementFactory::make("rtph264depay").build()?;
            let whole =
                gst::ElementFactory::make("capsfilter").property("caps", src.caps()).build()?;
            bin.add_many([&depay, &whole])?;
            depay.link(&whole)?;
            for (template, element) in [(sink, &depay), (src, &whole)] {
                let pad = element.static_pad(template.name_template()).expect("it is always there");
                bin.add_pad(&gst::GhostPad::from_template_with_target(template, &pad)?)?;
            }
            Ok(())
        }
    }

    impl ObjectImpl for H264Depay {
        fn constructed(&self) {
            self.parent_constructed();
            if let Err(why) = self.fill() {
                tracing::warn!("H.264 can't be taken out of RTP: {why}");
            }
        }
    }

    impl GstObjectImpl for H264Depay {}

    impl ElementImpl for H264Depay {
        fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
            static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
                gst::subclass::ElementMetadata::new(
                    "H.264 depayloader for whole pictures",
                    "Codec/Depayloader/Network/RTP",
                    "Asks rtph264depay for whole pictures",
                    "noblink",
                )
            });
            Some(&*METADATA)
        }

        fn pad_templates() -> &'static [gst::PadTemplate] {
            &*TEMPLATES
        }
    }

    impl BinImpl for H264Depay {}
}
