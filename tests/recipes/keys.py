"""Keys of every shape that is known, drawn at random and never in use, and names that only look like keys.

Shapes after the rules of gitleaks 8.21 and TruffleHog 3.82, and the owners' own pages.
"""

from __future__ import annotations

import base64
import json
import random
import string
import uuid

LETTERS = string.ascii_letters
ALNUM = LETTERS + string.digits
URL_SAFE = ALNUM + "-_"
BASE64 = ALNUM + "+/"
HEX = "0123456789abcdef"
BASE32 = string.ascii_uppercase + "234567"


def keys(rng: random.Random) -> dict[str, str]:
    """Kind of secret, with what its text stands in where there are several -> a line that holds one."""

    def draw(alphabet: str, size: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(size))

    def part(content: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()

    jwt = f"{part({'alg': 'HS256'})}.{part({'sub': draw(ALNUM, 8)})}.{draw(URL_SAFE, 43)}"
    digits = draw(string.digits, 12)
    pem = "\n#".join(draw(BASE64, 64) for _ in range(12))
    return {
        "an OpenAI API key: before 2024": f"sk-{draw(ALNUM, 20)}T3BlbkFJ{draw(ALNUM, 20)}",
        "an OpenAI API key: project": f"sk-proj-{draw(URL_SAFE, 74)}T3BlbkFJ{draw(URL_SAFE, 74)}",
        "an OpenAI API key: project of 2024": f"sk-proj-{draw(ALNUM, 48)}",
        "an OpenAI API key: service account": f"sk-svcacct-{draw(URL_SAFE, 74)}T3BlbkFJ{draw(URL_SAFE, 74)}",
        "an Anthropic API key": f"sk-ant-api03-{draw(URL_SAFE, 93)}AA",
        "an API key: DeepSeek": f"sk-{draw(HEX, 30)}a0",
        "an API key: OpenRouter": f"sk-or-v1-{draw(HEX, 62)}a0",
        "an API key: LiteLLM": f"sk-{draw(URL_SAFE, 22)}",
        "an API key: Moonshot": f"sk-{draw(ALNUM, 48)}",
        "an API key: Groq": f"gsk_{draw(ALNUM, 52)}",
        "an API key: xAI": f"xai-{draw(ALNUM, 80)}",
        "an API key: NVIDIA": f"nvapi-{draw(URL_SAFE, 64)}",
        "an API key: Replicate": f"r8_{draw(ALNUM, 37)}",
        "a Databricks token": f"dapi{draw(HEX, 30)}a0-2",
        "a Hugging Face token": f"hf_{draw(LETTERS, 34)}",
        "a Hugging Face token: organization": f"api_org_{draw(LETTERS, 34)}",
        "an AWS key id": f"AKIA{draw(BASE32, 16)}",
        "an AWS key id: of a session": f"ASIA{draw(BASE32, 16)}",
        "the value of a secret: AWS": f"aws_secret_access_key = {draw(BASE64, 40)}",
        "the value of a secret: JSON": f'"api_key": "{draw(HEX, 40)}"',
        "the value of a secret: flag": f"--hub-token {draw(ALNUM, 32)}",
        "the value of a secret: query": f"https://host/rows.jsonl?access_token={draw(ALNUM, 40)}",
        "a GitHub token": f"ghp_{draw(ALNUM, 36)}",
        "a GitHub token: of an app": f"ghs_{draw(ALNUM, 36)}",
        "a GitHub token: fine-grained": f"github_pat_{draw(ALNUM, 22)}_{draw(ALNUM, 59)}",
        "a GitLab token": f"glpat-{draw(URL_SAFE, 20)}",
        "a GitLab token: routable": f"glpat-{draw(URL_SAFE, 27)}.01.{draw(string.digits + 'abcdef', 7)}",
        "a Prefect API key": f"pnu_{draw(ALNUM, 36)}",
        "a Slack token: bot": f"xoxb-{digits}-{digits}-{draw(ALNUM, 24)}",
        "a Slack token: user": f"xoxp-{digits}-{digits}-{digits}-{draw(HEX, 32)}",
        "a Slack token: app": f"xapp-1-A{draw(BASE32, 10)}-{digits}-{draw(HEX, 64)}",
        "a Slack address": f"https://hooks.slack.com/services/T{draw(BASE32, 9)}/B{draw(BASE32, 9)}/{draw(ALNUM, 24)}",
        "a Google API key": f"AIza{draw(URL_SAFE, 35)}",
        "a Google client secret": f"GOCSPX-{draw(URL_SAFE, 28)}",
        "a signed token (JWT)": jwt,
        "an authorization header: bearer": f"Authorization: Bearer {draw(ALNUM, 32)}",
        "an authorization header: basic": f"Authorization: Basic {draw(BASE64, 30)}==",
        "a signed address": f"https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Signature={draw(HEX, 64)}",
        "a URL with a password": f"postgresql://me:planted-{draw(ALNUM, 8)}@db/x",
        "a private key: RSA": f"-----BEGIN RSA PRIVATE KEY-----\n#{pem}\n#-----END RSA PRIVATE KEY-----",
        "a private key: encrypted": "-----BEGIN RSA PRIVATE KEY-----\n#Proc-Type: 4,ENCRYPTED\n"
        f"#DEK-Info: AES-128-CBC,{draw(HEX, 32)}\n#\n#{pem}\n#-----END RSA PRIVATE KEY-----",
        "a private key: OpenSSH": f"-----BEGIN OPENSSH PRIVATE KEY-----\\n{pem[:64]}\\n-----END OPENSSH KEY-----",
    }


def key_in(line: str) -> str:
    """What of a line nobody may see: of a private key its last whole line, of others the longest word."""
    if "PRIVATE KEY" in line:
        return max((word for word in line.replace("\\n", " ").replace("#", "").split() if "-" not in word), key=len)
    words = line.replace("=", " ").replace('"', " ").replace("me:", " ").replace("@", " ").split()
    return max((word for word in words if not word.startswith("http")), key=len, default=line.rpartition("/")[2])


SHAPES = keys(random.Random(20_261_130))

LIKE_IDS = """
org/sk-wikipedia-instructions-2024 sk-learn-text-classification.jsonl hf_dataset_cleaned_v2 hf_internal_testing/tiny
org/sk-Qwen2-57B-A14B-Instruct-GPTQ-Int4 org/sk-Meta-Llama-3-1-8B-Instruct-AWQ-INT4 sk-slovak_SK-instructions-v1-2025
data/sk-learn_20newsgroups_train_clean.parquet org/sk-DeepSeek-R1-Distill-Qwen-1-5B akia-model-7b AKIAKI-benchmark
org/sk-proj-translations-of-the-year-2024-en-de-cleaned-v2 org/hf_InstructionTuningDatasetGermanV2 r8_replicate_models
org/hf_ultrachat_200k_filtered ghp_github_pull_requests_with_reviews_2024 github_pat_questions_and_answers_of_2024
glpat-training-data-for-german-v2 pnu_penn_treebank_universal_2_tagged AIzawa-corpus-of-spoken-japanese-2021-v2-clean
xoxo-emoji-sentiment-dataset-2024 xoxb-reviews-1-2-cleaned eyJson-lines-reader.v2.data gsk_english_german_slovak_2024
Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4 TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ HuggingFaceTB/SmolLM2-135M-Instruct
meta-llama/Meta-Llama-3.1-8B-Instruct microsoft/Phi-3-mini-128k-instruct bigcode/the-stack-v2-train-smol-ids
neuralmagic/Qwen2-0.5B-Instruct-quantized.w4a16 hf-internal-testing/tiny-random-LlamaForCausalLM s3://bucket/sk-rows
file:///data/sk-rows.jsonl hf://datasets/org/name@refs%2Fconvert%2Fparquet docker://python:3.11@sha256:abc token:bos
http://127.0.0.1:5000 https://me@host/rows.jsonl tokenizer:Qwen2TokenizerFast secret-santa-dialogues-2024
password:protected-documents-question-answering basic_instructions_following_set bearer-of-news-summarization
"""
WORDS = """
wikipedia instructions dialogues reviews medical legal German Slovak clean filtered train dpo sft chat summaries
reasoning Qwen Llama Mistral multi turn preference pairs code Python sql math science short long tickets support
internal domain rows sample balanced
"""


def honest_names(rng: random.Random) -> list[str]:
    """Names as people give them: from a list, and made of words, versions, sizes, digests, UUIDs and base64."""

    def draw(alphabet: str, size: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(size))

    words = WORDS.split()
    versions = ["v2", "2024", "8B", "200k", "en-de", "w4a16", "1-5B", "A14B", "final", "x3"]
    starts = ["sk-", "org/sk-", "hf_", "org/hf_", "ghp_", "gsk_", "xai-", "r8_", "glpat-", "nvapi-"]
    made: list[str] = []
    for _ in range(60):
        between = rng.choice("-_")
        stem = between.join([*rng.choices(words, k=rng.randint(3, 7)), rng.choice(versions)])
        made.append(rng.choice(starts) + stem)
    bare = ["", "data/", "org/", "rows-", "model_"]
    for _ in range(10):
        made += [
            rng.choice(bare) + draw(HEX, 40),  # a commit
            rng.choice(bare) + draw(HEX, 64) + ".safetensors",  # a digest
            rng.choice(bare) + str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            rng.choice(bare) + draw(URL_SAFE, 32) + ".parquet",  # a name in base64
            f"https://huggingface.co/org/sk-model/resolve/{draw(HEX, 40)}/model-00001-of-00002.safetensors",
        ]
    return [*LIKE_IDS.split(), *made]
