"""Crops of real pedestrians from a video: people that a detector finds, followed from frame to frame by overlap.

python real_people.py VIDEO OUT

Writes OUT/query/ID/*.png and OUT/gallery/ID/*.png: the beginning and the second half of each track. The labels are the
tracker's, which makes mistakes: they compare models and backends, and say nothing of accuracy.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

EVERY, LOST_AFTER, SHORTEST, CROPS = 3, 9, 16, 16
"""Frames between two detections, frames after which a track ends, and detections and crops of a track."""


@dataclass
class Track:
    """One person, as far as the tracker can tell."""

    frames: list[int] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)
    crops: list[np.ndarray] = field(default_factory=list)

    def add(self, frame: int, box: np.ndarray, image: np.ndarray) -> None:
        left, top, right, bottom = np.clip(np.rint(box), 0, [*image.shape[1::-1]] * 2).astype(int)
        self.frames.append(frame)
        self.boxes.append(box)
        self.crops.append(image[top:bottom, left:right].copy())


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    sides = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    common = sides.prod()
    return float(common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common))


def people(detector: cv2.HOGDescriptor, image: np.ndarray) -> list[np.ndarray]:
    """Boxes left, top, right, bottom; the detector's are larger than the people."""
    large = cv2.resize(image, None, fx=1.5, fy=1.5)
    found, scores = detector.detectMultiScale(large, winStride=(8, 8), scale=1.05, hitThreshold=0.2)
    boxes = []
    for (x, y, width, height), score in zip(found, np.ravel(scores), strict=True):
        if score > 0.4:
            margin = np.array([0.08 * width, 0.05 * height, -0.08 * width, -0.05 * height])
            boxes.append(np.add([x, y, x + width, y + height], margin) / 1.5)
    return boxes


def tracks_of(video: Path) -> list[Track]:
    """All tracks in the video, short ones too."""
    detector = cv2.HOGDescriptor()
    detector.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())
    capture, tracks, frame = cv2.VideoCapture(str(video)), [], -1
    while (read := capture.read())[0]:
        frame += 1
        if frame % EVERY:
            continue
        free = people(detector, read[1])
        for track in [track for track in tracks if frame - track.frames[-1] <= LOST_AFTER]:
            best = max(range(len(free)), key=lambda index: overlap(track.boxes[-1], free[index]), default=None)
            if best is not None and overlap(track.boxes[-1], free[best]) > 0.5:
                track.add(frame, free.pop(best), read[1])
        for box in free:
            if all(overlap(box, other) < 0.3 for other in free if other is not box):
                tracks.append(Track())
                tracks[-1].add(frame, box, read[1])
    return tracks


def write(tracks: list[Track], out: Path) -> int:
    """The number of people written."""
    long = [track for track in tracks if len(track.crops) >= SHORTEST]
    for pid, track in enumerate(long):
        chosen = range(0, len(track.crops), max(1, len(track.crops) // CROPS))
        for place, index in enumerate(chosen):
            part = "query" if place < 2 else "gallery" if place >= len(chosen) // 2 else ""
            if part and track.crops[index].size:
                folder = out / part / f"person-{pid:03d}"
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"{track.frames[index]:04d}.png"), track.crops[index])
    return len(long)


if __name__ == "__main__":
    print(write(tracks_of(Path(sys.argv[1])), Path(sys.argv[2])), "people")
