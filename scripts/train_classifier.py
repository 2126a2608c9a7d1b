"""
Trains the classifier that tells what codecs and generators have made, on crops in which one event is heard alone:

    python scripts/train_classifier.py --data_dir sounds --output_dir runs/classifier

It must not hear anything but the dataset's own sounds, or it would be no independent judge. The dataset needs strong
labels, as that of `transformers-aar dataset synth` has. Options may also stand in a YAML file, named first.
"""

from transformers_aar.training.classifier_training import ClassifierArguments, train_classifier
from transformers_aar.training.runs import run_script

if __name__ == "__main__":
    run_script(train_classifier, ClassifierArguments)
