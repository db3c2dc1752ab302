"""Files of radiographs and masks, for tests of how they are read."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"


def draw_picture(rows=48, columns=32):
    """Returns a picture without symmetry, float32 from 0 to 1 with many grey values."""
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    picture = 0.1 + 0.5 * y / rows + 0.2 * x / columns
    picture[4:12, 3:9] = 0.95
    return picture


def make_png(pixels, colour_type, depth=16):
    """Returns a PNG of unsigned pixels [Y X C]; Pillow writes no 16-bit colour."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows, columns = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(f">u{depth // 8}").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", columns, rows, depth, colour_type, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def make_tiff(pixels, orientation=1, photometric=None, deflate=False, planar=1):
    """Returns a TIFF of one strip of pixels [Y X C]; the sample format is that of their type."""
    rows, columns, channels = pixels.shape
    data = pixels.transpose(2, 0, 1).tobytes() if planar == 2 else pixels.tobytes()
    data = zlib.compress(data) if deflate else data
    bits = pixels.dtype.itemsize * 8
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = {
        256: (columns,),
        257: (rows,),
        258: (bits,) * channels,
        259: (8 if deflate else 1,),
        262: ((2 if channels > 2 else 1) if photometric is None else photometric,),
        273: (8,),
        274: (orientation,),
        277: (channels,),
        278: (rows,),
        279: (len(data) // planar if planar == 1 else len(data),),
        284: (planar,),
        339: (kind,) * channels,
    }
    if channels in (2, 4):
        tags[338] = (2,)  # alpha that is not premultiplied
    start = 8 + len(data) + len(data) % 2
    extra = start + 2 + 12 * len(tags) + 4
    entries, tail = b"", b""
    for tag, values in sorted(tags.items()):
        content = struct.pack(f"<{len(values)}L", *values)
        if len(values) > 1:
            content, tail = struct.pack("<L", extra + len(tail)), tail + content
        entries += struct.pack("<HHL", tag, 4, len(values)) + content
    directory = struct.pack("<H", len(tags)) + entries + bytes(4) + tail
    return struct.pack("<2sHL", b"II", 42, start) + data + bytes(len(data) % 2) + directory


def save_with_orientation(pixels, path, orientation, **options):
    """Saves pixels that are upright after they are turned as the EXIF orientation says."""
    inverse = {
        1: lambda image: image,
        2: np.fliplr,
        3: lambda image: np.rot90(image, 2),
        4: np.flipud,
        5: lambda image: image.swapaxes(0, 1),
        6: lambda image: np.rot90(image, 1),
        7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
        8: lambda image: np.rot90(image, -1),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(inverse[orientation](pixels))
    Image.fromarray(stored).save(path, exif=exif, **options)


def make_dicom(stored, syntax="1.2.840.10008.1.2.1", **elements):
    """Returns a DICOM file of stored values [Y X] or [Y X 3]; None deletes an element.

    With the transfer syntax of a compression, the pixels are no stream that can be decoded.
    """
    import pydicom

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Modality = "DX"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = stored.shape[2] if stored.ndim == 3 else 1
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PixelRepresentation = int(np.issubdtype(stored.dtype, np.signedinteger))
    dataset.BitsAllocated = dataset.BitsStored = stored.dtype.itemsize * 8
    dataset.PhotometricInterpretation = "RGB" if stored.ndim == 3 else "MONOCHROME2"
    dataset.PixelData = stored.tobytes()
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        dataset.PixelData = pydicom.encaps.encapsulate([stored.tobytes()])
        dataset["PixelData"].VR = "OB"
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def make_jpeg_dicom(pixels, **elements):
    """Returns a DICOM file of 8-bit grey pixels [Y X] as JPEG baseline, as Kaggle's are."""
    import pydicom

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    stream = pydicom.encaps.encapsulate([buffer.getvalue()])
    return make_dicom(pixels, JPEG_BASELINE, PixelData=stream, **elements)


def make_jpeg2000_dicom(pixels, **elements):
    """Returns a DICOM file of grey pixels [Y X] of up to 16 bits as lossless JPEG 2000."""
    import pydicom

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, irreversible=False)
    stream = pydicom.encaps.encapsulate([buffer.getvalue()])
    return make_dicom(pixels, JPEG_2000_LOSSLESS, PixelData=stream, **elements)
